/* The origin of the benchmark: a host that speaks Ollama's wire, much faster than any proxy.
 *
 *     origin PORT        listens on 127.0.0.1 (0 = any port), prints `ready` (with port 0: `ready PORT`),
 *                        ends on SIGTERM or when its stdin closes
 *
 * What a call shall look like travels inside its prompt, so every proxy passes it on:
 *
 *     #bench n=<chunks> us=<mean interval> delay=<us before the first byte> size=<bytes of text>
 *            status=<200> cut=<close with RST after k chunks, 0 = never> id=<token>#
 *
 * n records of text are streamed, numbered from 1, then a terminal record without text. Text begins
 * with `<number>.<CLOCK_MONOTONIC ns at send>.` and is padded to `size`. Intervals vary by a quarter.
 * GET /bench/aborts gives {"id": ns} of calls whose client left before the end, and forgets them.
 *
 * Laws: one thread, no lock; one send() per record, because how a proxy joins records is measured;
 * a reader that stops costs nothing but its unsent bytes; sockets are edge-triggered and registered
 * once; pipelined requests are refused, no proxy should send any.
 */
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    HEAD_LIMIT = 16 << 10,
    KEPT_SIDE = 8 << 10, /* the script is looked for in this much of each end of a body */
    READ_SIZE = 64 << 10, /* small, so that an upload does not hold up the streams */
    TEXT_LIMIT = 1 << 20,
    RECORDS_PER_TURN = 64, /* of one stream without pauses, before the others get their turn */
    ID_LIMIT = 40,
    EMBEDDING_LENGTH = 768,
};

#define CREATED "2026-11-21T12:24:16.302206973Z"
#define NATIVE "{\"model\":\"" MODEL "\",\"created_at\":\"" CREATED "\","
#define OPENAI(object) \
    "{\"id\":\"chatcmpl-7\",\"object\":\"" object "\",\"created\":1795263856,\"model\":\"" MODEL \
    "\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,"
#define SAMPLE_METRICS \
    ",\"total_duration\":41200300,\"load_duration\":1100200,\"prompt_eval_count\":512"
#define JSON "application/json; charset=utf-8"

/* How a route words its answers. */
struct dialect {
    const char *path;
    bool streams_by_default;
    const char *media;                                 /* of a stream */
    const char *record_before, *record_after;          /* around the text of a record */
    const char *terminal, *terminal_after;             /* metrics stand between them, if any */
    const char *document_before, *document_after, *document_end; /* not streamed: the same */
};

static const struct dialect dialects[] = {
    {.path = "/api/chat",
     .streams_by_default = true,
     .media = "application/x-ndjson",
     .record_before = NATIVE "\"message\":{\"role\":\"assistant\",\"content\":\"",
     .record_after = "\"},\"done\":false}\n",
     .terminal = NATIVE "\"message\":{\"role\":\"assistant\",\"content\":\"\"},"
                        "\"done\":true,\"done_reason\":\"stop\"",
     .terminal_after = "}\n",
     .document_before = NATIVE "\"message\":{\"role\":\"assistant\",\"content\":\"",
     .document_after = "\"},\"done\":true,\"done_reason\":\"stop\"",
     .document_end = "}"},
    {.path = "/api/generate",
     .streams_by_default = true,
     .media = "application/x-ndjson",
     .record_before = NATIVE "\"response\":\"",
     .record_after = "\",\"done\":false}\n",
     .terminal = NATIVE "\"response\":\"\",\"done\":true,\"done_reason\":\"stop\"",
     .terminal_after = "}\n",
     .document_before = NATIVE "\"response\":\"",
     .document_after = "\",\"done\":true,\"done_reason\":\"stop\"",
     .document_end = "}"},
    {.path = "/v1/chat/completions",
     .media = "text/event-stream",
     .record_before =
         "data: " OPENAI("chat.completion.chunk") "\"delta\":{\"role\":\"assistant\",\"content\":\"",
     .record_after = "\"},\"finish_reason\":null}]}\n\n",
     .terminal = "data: " OPENAI("chat.completion.chunk") "\"delta\":{},\"finish_reason\":\"stop\"}]}"
                                                          "\n\ndata: [DONE]\n\n",
     .document_before = OPENAI("chat.completion") "\"message\":{\"role\":\"assistant\",\"content\":\"",
     .document_after = "\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":26,"
                       "\"completion_tokens\":1,\"total_tokens\":27}}"},
};

struct script {
    bool present;
    uint64_t n, us, delay, size, status, cut;
    char id[ID_LIMIT];
};

struct conn {
    struct timer timer; /* first, so that a timer is its connection */
    int fd;
    enum { READING_HEAD, READING_BODY, ANSWERING } phase;
    bool unread;   /* bytes arrived while it was answering */
    bool streams, head_only, closes;
    bool ended;    /* all of the answer is rendered */
    struct body body;
    struct script script;
    const struct dialect *dialect; /* NULL: not a scripted route */
    uint64_t start_ns, sequence, randomness;
    char *rest; /* what the socket did not take */
    size_t rest_length, rest_at;
    char path[64];
    bool is_post, is_http10;
    size_t head_length, kept_length;
    char head[HEAD_LIMIT];
    char kept[2 * KEPT_SIDE]; /* both ends of the body; all of it if it is short */
    struct conn *next_free;
};

struct abort_seen {
    char id[ID_LIMIT];
    uint64_t ns;
};

static int epoll_fd, listen_fd;
static struct heap timers;
static struct conn *free_conns;
static struct abort_seen *aborts;
static size_t abort_count, abort_room;
static char input[READ_SIZE], output[TEXT_LIMIT + (64 << 10)], filler[TEXT_LIMIT];
static char tags[16 << 10], ps[2 << 10], embedding[16 << 10];
static char date_line[64];
static uint64_t date_until_ns;

static void read_more(struct conn *c);

/* ---- connections ---- */

static struct conn *conn_new(int fd) {
    struct conn *c = free_conns;
    if (c) free_conns = c->next_free;
    else c = grown(NULL, sizeof *c);
    memset(c, 0, offsetof(struct conn, head));
    c->fd = fd;
    return c;
}

static void remember_abort(const struct conn *c) {
    if (abort_count == abort_room) {
        abort_room = abort_room ? abort_room * 2 : 256;
        aborts = grown(aborts, abort_room * sizeof *aborts);
    }
    struct abort_seen *seen = &aborts[abort_count++];
    memcpy(seen->id, c->script.id, ID_LIMIT);
    seen->ns = now_ns();
}

static void conn_close(struct conn *c) {
    timer_clear(&timers, &c->timer);
    close(c->fd);
    free(c->rest);
    c->next_free = free_conns;
    free_conns = c;
}

/* The other side is gone. */
static void conn_lost(struct conn *c) {
    if (c->phase == ANSWERING && c->script.id[0]) remember_abort(c);
    conn_close(c);
}

static void conn_reset(struct conn *c) {
    struct linger now = {.l_onoff = 1, .l_linger = 0};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    conn_close(c);
}

/* ---- sending ---- */

enum sent { SENT, BLOCKED, LOST };

/* Sends, or keeps what the socket does not take now. */
static enum sent conn_send(struct conn *c, const char *bytes, size_t length) {
    if (!c->rest_length) {
        ssize_t n = send(c->fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n == (ssize_t)length) return SENT;
        if (n < 0 && errno != EAGAIN) {
            conn_lost(c);
            return LOST;
        }
        bytes += n < 0 ? 0 : n;
        length -= n < 0 ? 0 : (size_t)n;
    }
    c->rest = grown(c->rest, c->rest_length + length);
    put(c->rest + c->rest_length, bytes, length);
    c->rest_length += length;
    return BLOCKED;
}

static enum sent conn_flush(struct conn *c) {
    ssize_t n = send(c->fd, c->rest + c->rest_at, c->rest_length - c->rest_at, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN) {
        conn_lost(c);
        return LOST;
    }
    if (n > 0) c->rest_at += (size_t)n;
    if (c->rest_at < c->rest_length) return BLOCKED;
    c->rest_length = c->rest_at = 0;
    return SENT;
}

static void answer_done(struct conn *c) {
    if (c->closes) {
        conn_close(c);
        return;
    }
    c->phase = READING_HEAD;
    c->head_length = c->kept_length = 0;
    if (c->unread) read_more(c);
}

/* Sends the last bytes of an answer. */
static void answer_last(struct conn *c, const char *bytes, size_t length) {
    c->ended = true;
    if (conn_send(c, bytes, length) == SENT) answer_done(c);
}

/* ---- rendering ---- */

static const char *date(void) {
    uint64_t now = now_ns();
    if (now >= date_until_ns) {
        time_t wall = time(NULL);
        strftime(date_line, sizeof date_line, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", gmtime(&wall));
        date_until_ns = now + SECOND / 2;
    }
    return date_line;
}

static char *put_head(char *at, const struct conn *c, uint64_t status, const char *media) {
    at = put_text(at, "HTTP/1.1 ");
    at = put_number(at, status);
    at = put_text(at, status == 200 ? " OK\r\nContent-Type: " : " Scripted\r\nContent-Type: ");
    at = put_text(at, media);
    at = put_text(at, "\r\n");
    at = put_text(at, date());
    return c->closes ? put_text(at, "Connection: close\r\n") : at;
}

static char *put_stream_head(char *at, const struct conn *c) {
    at = put_head(at, c, 200, c->dialect->media);
    return put_text(at, "Transfer-Encoding: chunked\r\n\r\n");
}

/* Wraps payload, rendered 16 bytes behind `at`, as one chunk; returns its end. */
static char *close_chunk(char *at, char *end) {
    size_t length = (size_t)(end - (at + 16));
    int shift = 0;
    while (length >> shift >> 4) shift += 4;
    for (; shift >= 0; shift -= 4) *at++ = "0123456789abcdef"[length >> shift & 15];
    at = put(at, "\r\n", 2);
    memmove(at, end - length, length);
    return put(at + length, "\r\n", 2);
}

static char *put_content(char *at, uint64_t sequence, uint64_t size) {
    char *start = at;
    at = put_number(at, sequence);
    *at++ = '.';
    at = put_number(at, now_ns());
    *at++ = '.';
    size_t length = (size_t)(at - start);
    return length < size ? put(at, filler, size - length) : at;
}

static char *put_metrics(char *at, const struct conn *c) {
    uint64_t total = now_ns() - c->start_ns, delay = c->script.delay * US;
    at = put_text(at, ",\"total_duration\":");
    at = put_number(at, total + 1);
    at = put_text(at, ",\"load_duration\":1100200,\"prompt_eval_count\":26,\"prompt_eval_duration\":");
    at = put_number(at, delay + 1);
    at = put_text(at, ",\"eval_count\":");
    at = put_number(at, c->script.n ? c->script.n : 1);
    at = put_text(at, ",\"eval_duration\":");
    return put_number(at, (total > delay ? total - delay : 0) + 1);
}

static char *put_document(char *at, const struct conn *c) {
    at = put_text(at, c->dialect->document_before);
    at = put_content(at, 1, c->script.size);
    at = put_text(at, c->dialect->document_after);
    return c->dialect->document_end ? put_text(put_metrics(at, c), c->dialect->document_end) : at;
}

static char *put_record(char *at, const struct conn *c) {
    char *chunk = at;
    at = put_text(at + 16, c->dialect->record_before);
    at = put_content(at, c->sequence, c->script.size);
    return close_chunk(chunk, put_text(at, c->dialect->record_after));
}

static char *put_terminal(char *at, const struct conn *c) {
    char *chunk = at;
    at = put_text(at + 16, c->dialect->terminal);
    if (c->dialect->terminal_after) at = put_text(put_metrics(at, c), c->dialect->terminal_after);
    return close_chunk(chunk, at);
}

/* A whole answer with a length. */
static void answer(struct conn *c, uint64_t status, const char *media, const char *text, size_t length) {
    char *at = put_head(output, c, status, media);
    at = put_text(at, "Content-Length: ");
    at = put_number(at, length);
    at = put_text(at, "\r\n\r\n");
    if (c->head_only) length = 0;
    if (length < TEXT_LIMIT) {
        at = put(at, text, length);
        length = 0;
    }
    if (!length) answer_last(c, output, (size_t)(at - output));
    else if (conn_send(c, output, (size_t)(at - output)) != LOST) answer_last(c, text, length);
}

static void answer_text(struct conn *c, uint64_t status, const char *text) {
    answer(c, status, JSON, text, strlen(text));
}

/* ---- scripted answers ---- */

static void stream_terminal(struct conn *c) {
    char *at = c->sequence ? output : put_stream_head(output, c);
    at = put_terminal(at, c);
    if (conn_send(c, output, (size_t)(at - output)) == LOST) return;
    static const char last_chunk[] = "0\r\n\r\n"; /* in a send of its own, as Go's server does */
    answer_last(c, last_chunk, sizeof last_chunk - 1);
}

static enum sent stream_record(struct conn *c) {
    char *at = c->sequence++ ? output : put_stream_head(output, c);
    at = put_record(at, c);
    return conn_send(c, output, (size_t)(at - output));
}

/* The mean interval ± 25 %. */
static uint64_t interval_ns(struct conn *c) {
    return (uint64_t)((double)(c->script.us * US) * (0.75 + 0.5 * random_unit(&c->randomness)));
}

/* Sends the records that are due; a stream that fell behind catches up. */
static void stream_step(struct conn *c, uint64_t due_ns) {
    uint64_t now = now_ns();
    for (int turn = 0; turn < RECORDS_PER_TURN && due_ns <= now; ++turn) {
        if (c->script.cut && c->sequence == c->script.cut) {
            conn_reset(c);
            return;
        }
        if (c->sequence == c->script.n) {
            stream_terminal(c);
            return;
        }
        if (stream_record(c) != SENT) return;
        due_ns += interval_ns(c);
    }
    timer_set(&timers, &c->timer, due_ns > now ? due_ns : now + 1);
}

static void answer_scripted(struct conn *c) {
    if (c->script.status != 200) {
        char text[64];
        snprintf(text, sizeof text, "{\"error\":\"scripted status %d\"}", (int)c->script.status);
        answer_text(c, c->script.status, text);
    } else if (!c->dialect) {
        answer_text(c, 200, embedding);
    } else if (c->streams) {
        stream_step(c, now_ns());
    } else {
        static char text[TEXT_LIMIT + (4 << 10)];
        answer(c, 200, JSON, text, (size_t)(put_document(text, c) - text));
    }
}

static const char *script_value(const char *at, const char *end, const char *key) {
    const char *found = find(at, (size_t)(end - at), key);
    return found ? found + strlen(key) : NULL;
}

static uint64_t script_number(const char *at, const char *end, const char *key, uint64_t otherwise) {
    const char *value = script_value(at, end, key);
    return value ? take_number(&value, end) : otherwise;
}

static void read_script(struct conn *c) {
    struct script *s = &c->script;
    *s = (struct script){.status = 200};
    const char *at = find(c->kept, c->kept_length, "#bench ");
    if (!at) return;
    const char *end = memchr(at + 1, '#', (size_t)(c->kept + c->kept_length - at - 1));
    if (!end) return;
    s->present = true;
    s->n = script_number(at, end, " n=", 0);
    s->us = script_number(at, end, " us=", 0);
    s->delay = script_number(at, end, " delay=", 0);
    s->size = script_number(at, end, " size=", 0);
    if (s->size > TEXT_LIMIT) s->size = TEXT_LIMIT;
    s->status = script_number(at, end, " status=", 200);
    s->cut = script_number(at, end, " cut=", 0);
    const char *id = script_value(at, end, " id=");
    for (size_t i = 0; id && id + i < end && i < ID_LIMIT - 1; ++i) {
        if (id[i] == ' ' || id[i] == '"' || id[i] == '\\') break;
        s->id[i] = id[i];
    }
}

static bool body_has(const struct conn *c, const char *flag, const char *spaced) {
    return find(c->kept, c->kept_length, flag) || find(c->kept, c->kept_length, spaced);
}

static bool wants_stream(const struct conn *c) {
    if (!c->dialect || !c->script.present) return false;
    if (body_has(c, "\"stream\":true", "\"stream\": true")) return true;
    return c->dialect->streams_by_default && c->script.n &&
           !body_has(c, "\"stream\":false", "\"stream\": false");
}

static void start_script(struct conn *c) {
    static uint64_t seed = 1;
    read_script(c);
    c->streams = wants_stream(c);
    c->sequence = 0;
    c->start_ns = now_ns();
    c->randomness = ++seed;
    if (c->script.delay) timer_set(&timers, &c->timer, c->start_ns + c->script.delay * US);
    else answer_scripted(c);
}

/* ---- routes ---- */

static void answer_aborts(struct conn *c) {
    char *text = grown(NULL, abort_count * (ID_LIMIT + 32) + 3), *at = text;
    *at++ = '{';
    for (size_t i = 0; i < abort_count; ++i)
        at += sprintf(at, "%s\"%s\":%llu", i ? "," : "", aborts[i].id, (unsigned long long)aborts[i].ns);
    *at++ = '}';
    abort_count = 0;
    answer(c, 200, JSON, text, (size_t)(at - text));
    free(text);
}

static void answer_get(struct conn *c) {
    if (!strcmp(c->path, "/api/tags")) answer_text(c, 200, tags);
    else if (!strcmp(c->path, "/api/ps")) answer_text(c, 200, ps);
    else if (!strcmp(c->path, "/api/version")) answer_text(c, 200, "{\"version\":\"0.33.0\"}");
    else if (!strcmp(c->path, "/")) answer(c, 200, "text/plain; charset=utf-8", "Ollama is running", 17);
    else if (!strcmp(c->path, "/bench/aborts")) answer_aborts(c);
    else answer_text(c, 404, "{\"error\":\"not found\"}");
}

static void answer_post(struct conn *c) {
    c->dialect = NULL;
    for (size_t i = 0; i < sizeof dialects / sizeof *dialects; ++i)
        if (!strcmp(c->path, dialects[i].path)) c->dialect = &dialects[i];
    if (c->is_http10) answer_text(c, 505, "{\"error\":\"the benchmark speaks HTTP/1.1\"}");
    else if (c->dialect || !strcmp(c->path, "/api/embed")) start_script(c);
    else if (!strcmp(c->path, "/api/show"))
        answer_text(c, 200,
                    "{\"details\":{\"parent_model\":\"\",\"format\":\"gguf\",\"family\":\"llama\"},"
                    "\"model_info\":{\"general.architecture\":\"llama\",\"llama.context_length\":32768},"
                    "\"capabilities\":[\"completion\"]}");
    else answer_text(c, 404, "{\"error\":\"not found\"}");
}

static void request_complete(struct conn *c) {
    c->phase = ANSWERING;
    c->ended = false;
    c->script.id[0] = 0;
    if (c->is_post) answer_post(c);
    else answer_get(c);
}

/* ---- reading ---- */

static void keep_body(struct conn *c, const char *bytes, size_t length) {
    size_t room = sizeof c->kept - c->kept_length;
    size_t whole = length < room ? length : room;
    put(c->kept + c->kept_length, bytes, whole);
    c->kept_length += whole;
    bytes += whole;
    if (!(length -= whole)) return;
    char *tail = c->kept + KEPT_SIDE;
    size_t fresh = length < KEPT_SIDE ? length : KEPT_SIDE;
    memmove(tail, tail + fresh, KEPT_SIDE - fresh);
    memcpy(tail + KEPT_SIDE - fresh, bytes + length - fresh, fresh);
}

static bool parse_head(struct conn *c, size_t length) {
    const char *line_end = memchr(c->head, '\r', length);
    const char *space = memchr(c->head, ' ', (size_t)(line_end - c->head));
    if (!space || line_end - space < 10) return false;
    const char *target = space + 1, *target_end = memchr(target, ' ', (size_t)(line_end - target));
    if (!target_end) return false;
    const char *query = memchr(target, '?', (size_t)(target_end - target));
    size_t path_length = (size_t)((query ? query : target_end) - target);
    if (path_length >= sizeof c->path) path_length = sizeof c->path - 1;
    *put(c->path, target, path_length) = 0;
    c->is_post = !memcmp(c->head, "POST", 4);
    c->head_only = !memcmp(c->head, "HEAD", 4);
    c->is_http10 = line_end[-1] == '0';
    struct framing f = read_framing(line_end + 2, c->head + length);
    c->closes = f.close || c->is_http10;
    c->body = (struct body){.kind = f.chunked ? BODY_CHUNKED : BODY_LENGTH, .left = f.chunked ? 0 : f.length};
    c->body.done = !f.chunked && !f.length;
    c->phase = READING_BODY;
    if (f.expects_continue && !c->body.done) {
        static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
        return send(c->fd, go_on, sizeof go_on - 1, MSG_NOSIGNAL | MSG_DONTWAIT) > 0;
    }
    return true;
}

/* Collects the head; returns how many of these bytes belong to it, -1 if they make no head. */
static ssize_t read_head(struct conn *c, const char *bytes, size_t length) {
    size_t before = c->head_length, room = HEAD_LIMIT - before;
    size_t taken = length < room ? length : room;
    put(c->head + before, bytes, taken);
    c->head_length += taken;
    size_t from = before > 3 ? before - 3 : 0;
    const char *end = find(c->head + from, c->head_length - from, "\r\n\r\n");
    if (!end) return c->head_length < HEAD_LIMIT ? (ssize_t)taken : -1;
    size_t head_length = (size_t)(end + 4 - c->head);
    return parse_head(c, head_length - 2) ? (ssize_t)(head_length - before) : -1;
}

static void read_bytes(struct conn *c, const char *bytes, size_t length) {
    if (c->phase == READING_HEAD) {
        ssize_t taken = read_head(c, bytes, length);
        if (taken < 0) {
            conn_close(c);
            return;
        }
        bytes += taken;
        length -= (size_t)taken;
    }
    while (c->phase == READING_BODY && length && !c->body.done && !c->body.bad) {
        const char *piece;
        size_t piece_length, taken = body_take(&c->body, bytes, length, &piece, &piece_length);
        if (piece_length) keep_body(c, piece, piece_length);
        bytes += taken;
        length -= taken;
    }
    if (c->body.bad || (length && c->phase == READING_BODY)) {
        fprintf(stderr, "origin: %s\n", c->body.bad ? "broken chunks" : "pipelined request");
        conn_close(c);
    } else if (c->phase == READING_BODY && c->body.done) {
        request_complete(c);
    }
}

/* One read; if it filled the buffer, the rest comes after the others had their turn. */
static void read_more(struct conn *c) {
    c->unread = false;
    ssize_t n = recv(c->fd, input, sizeof input, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        conn_lost(c);
        return;
    }
    if (n == sizeof input) timer_set(&timers, &c->timer, now_ns());
    read_bytes(c, input, (size_t)n);
}

/* ---- events ---- */

static void on_timer(struct conn *c) {
    if (c->phase != ANSWERING) read_more(c);
    else if (c->rest_length) return; /* blocked: the socket will tell */
    else if (c->sequence) stream_step(c, c->timer.due_ns);
    else answer_scripted(c);
}

/* A client that only closes its own side has left, too. */
static void on_event(struct conn *c, uint32_t events) {
    if (events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) {
        conn_lost(c);
        return;
    }
    if (events & EPOLLOUT && c->phase == ANSWERING && c->rest_length) {
        enum sent sent = conn_flush(c);
        if (sent == LOST) return;
        if (events & EPOLLIN) c->unread = true;
        if (sent == SENT && c->ended) answer_done(c);
        else if (sent == SENT) timer_set(&timers, &c->timer, now_ns()); /* no catching up */
        return;
    }
    if (!(events & EPOLLIN)) return;
    if (c->phase == ANSWERING) c->unread = true;
    else read_more(c);
}

static void watch(int fd, uint32_t events, void *what) {
    struct epoll_event event = {.events = events, .data.ptr = what};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) && errno != EPERM) die("epoll_ctl");
}

static void accept_all(void) {
    for (;;) {
        int fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
        if (fd < 0) {
            if (errno == EAGAIN || errno == ECONNABORTED) return;
            die("origin: accept");
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, conn_new(fd));
    }
}

static void wait_events(struct epoll_event *events, int room, int *count) {
    struct timespec pause, *timeout = NULL;
    if (timers.count) {
        uint64_t now = now_ns(), due = timers.at[1]->due_ns, left = due > now ? due - now : 0;
        pause = (struct timespec){.tv_sec = (time_t)(left / SECOND), .tv_nsec = (long)(left % SECOND)};
        timeout = &pause;
    }
    *count = epoll_pwait2(epoll_fd, events, room, timeout, NULL);
    if (*count < 0 && errno != EINTR) die("epoll_pwait2");
}

static void serve(void) {
    struct epoll_event events[512];
    for (;;) {
        int count;
        wait_events(events, 512, &count);
        for (int i = 0; i < count; ++i) {
            if (events[i].data.ptr == &listen_fd) accept_all();
            else if (events[i].data.ptr) on_event(events[i].data.ptr, events[i].events);
            else if (read(STDIN_FILENO, input, sizeof input) <= 0) return;
        }
        uint64_t now = now_ns();
        for (struct timer *due; (due = timer_due(&timers, now));) on_timer((struct conn *)due);
    }
}

/* ---- constant answers ---- */

__attribute__((format(printf, 2, 3))) static char *print(char *at, const char *format, ...) {
    va_list values;
    va_start(values, format);
    at += vsprintf(at, format, values);
    va_end(values);
    return at;
}

static char *put_model(char *at, int number, bool modified) {
    char name[32];
    snprintf(name, sizeof name, number ? "bench-%d:latest" : MODEL, number);
    at = print(at, "{\"name\":\"%s\",\"model\":\"%s\",", name, name);
    if (modified) at = print(at, "\"modified_at\":\"2026-11-%02dT10:20:30.123456789Z\",", 20 - number);
    at = print(at, "\"size\":%lld,\"digest\":\"", 4661224676ll + 1000003ll * number);
    uint64_t digest = (uint64_t)number;
    for (int i = 0; i < 4; ++i) at = print(at, "%016llx", (unsigned long long)random_next(&digest));
    return print(at, "\",\"details\":{\"parent_model\":\"\",\"format\":\"gguf\",\"family\":\"llama\","
                     "\"families\":[\"llama\"],\"parameter_size\":\"8.0B\",\"quantization_level\":\"Q4_0\"}");
}

static void render_constants(void) {
    char *at = print(tags, "{\"models\":[");
    uint64_t seed = 7;
    for (int i = 0; i < 20; ++i) at = print(put_model(i ? print(at, ",") : at, i, true), "}");
    print(at, "]}");
    at = put_model(print(ps, "{\"models\":["), 0, false);
    print(at, ",\"expires_at\":\"2318-01-01T00:00:00Z\",\"size_vram\":4661224676,\"context_length\":4096}]}");
    at = print(embedding, "{\"model\":\"" MODEL "\",\"embeddings\":[[");
    for (int i = 0; i < EMBEDDING_LENGTH; ++i)
        at = print(at, "%s%.8f", i ? "," : "", (random_unit(&seed) - 0.5) / 8);
    print(at, "]]" SAMPLE_METRICS "}");
    static const char words[] = "and then the water went on over the stones as it had always done ";
    for (size_t i = 0; i < sizeof filler; ++i) filler[i] = words[i % (sizeof words - 1)];
}

static int listen_on(uint16_t port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, length) || listen(fd, 4096)) die("origin: listen");
    getsockname(fd, (struct sockaddr *)&address, &length);
    if (port) puts("ready");
    else printf("ready %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fputs("usage: origin PORT\n", stderr);
        return 2;
    }
    raise_descriptor_limit();
    prctl(PR_SET_TIMERSLACK, 1000);
    render_constants();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    listen_fd = listen_on((uint16_t)atoi(argv[1]));
    watch(listen_fd, EPOLLIN, &listen_fd);
    watch(STDIN_FILENO, EPOLLIN, NULL);
    serve();
    return 0;
}
