/* The load generator of the benchmark: holds streams, makes calls, checks all that comes back.
 *
 *     load --port P --mode M --seconds S [--warmup W] [options]      prints one JSON object
 *
 * Modes, of two flows. LOOP: so many connections, each does its next call when one has ended:
 *   closed  keep-alive calls of --what           churn   the same, a new connection per call
 *   streams held streams (opened during the warm-up, so that their phases are spread)
 *   short   20 chunks 5 ms apart                 burst   2,000 chunks without pause
 *   idle    streams with 30 s between chunks     slow    readers that stop after 10 chunks
 *   upload  20 MB image bodies                   mix     streams, and 2 connections that upload
 * ARRIVALS: --rate calls per second at Poisson times, whatever became of those before:
 *   rate    calls of --what, latency from the due time
 *   abort   streams left --after-us after their first chunk; abort-idle: after a request that
 *           gets no answer. Their ids and close times are printed, to be joined with what the
 *           origin saw.
 *
 * Laws: one thread, no lock; every chunk's number is checked, and its age by the stamp it bears;
 * reads are large, so chunks per read tell how much a proxy joins; what goes wrong is an error of
 * its own kind, and a call that fails is followed by another after a short pause.
 */
#include "asked.h"
#include "measure.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define RETRY_PAUSE (10 * MS)
#define DRAIN (5 * SECOND)
#define RAMP_STEP (250 * US) /* at least, between held streams: a burst would overflow backlogs */
#define UPLOAD_PACE (100 * MS) /* of mix: the same load for every proxy, never the most it can take */
#define STANDING_WAIT (10 * SECOND)

enum {
    READ_SIZE = 1 << 20,
    PUSH_SIZE = 64 << 10, /* of an upload at a time, so that streams are read in between */
    HEAD_LIMIT = 64 << 10,
    STOP_AFTER = 10, /* chunks, of a reader that stops */
    UPLOADERS = 2,
    KINDS = 4,
    SOURCES = 100, /* addresses 127.0.0.x */
};

/* ---- connections ---- */

struct conn {
    struct timer timer; /* first, so that a timer is its connection */
    int fd;
    enum { CLOSED, CONNECTING, BUSY, RESTING, STOPPED } phase;
    enum { OPEN, PUSH, LEAVE } wake; /* what its timer is for */
    uint32_t epoch;                  /* how often it was closed */
    bool used;                       /* it has had an answer */
    bool stood;                      /* it has flowed, if it is held */
    bool background;                 /* of mix: an uploader, its latencies do not count */
    const struct request *request, *first, *last; /* calls go round from first to last */
    char *own;                       /* the request with an id of its own */
    size_t sent, rest_slot;
    bool head_read, body_begun, terminal, closes, failed;
    char last_byte;
    int status;
    struct body body;
    uint64_t due_ns, chunk_ns, sequence, id;
    char *carry; /* a head or a line that came in pieces */
    size_t carry_length, carry_room;
    struct conn *next_free;
};

static struct request requests[KINDS];
static int epoll_fd;
static struct heap timers;
static struct timer arrival;
static struct sockaddr_in target;
static struct conn *conns, *free_conns; /* of LOOP; of ARRIVALS */
static uint64_t conn_count, in_flight, held, standing; /* standing: of the held, those that flow */
static struct conn **resting; /* kept alive between arrivals */
static size_t resting_count, resting_room;
static char input[READ_SIZE];
static uint64_t randomness;
static bool stopping;

static void conn_close(struct conn *c) {
    timer_clear(&timers, &c->timer);
    if (c->phase != CLOSED) close(c->fd);
    c->phase = CLOSED;
    c->carry_length = 0;
    ++c->epoch;
}

static void conn_reopen(struct conn *c, uint64_t at_ns) {
    c->wake = OPEN;
    timer_set(&timers, &c->timer, at_ns);
}

static void conn_free(struct conn *c) {
    c->next_free = free_conns;
    free_conns = c;
}

/* After a call, on a connection that is closed. */
static void conn_renew(struct conn *c, uint64_t at_ns) {
    if (mode->flow == LOOP) {
        if (!stopping) conn_reopen(c, at_ns);
        return;
    }
    --in_flight;
    conn_free(c);
}

static void call_failed(struct conn *c, const char *kind) {
    count_error(kind, 1);
    conn_close(c);
    conn_renew(c, now_ns() + RETRY_PAUSE);
}

static void rest(struct conn *c) {
    --in_flight;
    if (resting_count == resting_room) {
        resting_room = resting_room ? resting_room * 2 : 64;
        resting = grown(resting, resting_room * sizeof *resting);
    }
    c->phase = RESTING;
    c->rest_slot = resting_count;
    resting[resting_count++] = c;
}

static void rest_ended(struct conn *c) {
    struct conn *last = resting[--resting_count];
    resting[last->rest_slot = c->rest_slot] = last;
}

/* ---- sending ---- */

static void push(struct conn *c) {
    const char *bytes = c->own ? c->own : c->request->bytes;
    size_t left = c->request->length - c->sent;
    ssize_t n = send(c->fd, bytes + c->sent, left < PUSH_SIZE ? left : PUSH_SIZE, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        call_failed(c, "send");
        return;
    }
    if (n < 0) return;
    c->sent += (size_t)n;
    if (counts(now_ns())) measured.sent_bytes += (uint64_t)n;
    if (c->sent == c->request->length) {
        if (mode->delay_us && mode->leaves) {
            c->wake = LEAVE;
            timer_set(&timers, &c->timer, now_ns() + asked.after_us * US);
        }
    } else if (n == PUSH_SIZE) {
        c->wake = PUSH;
        timer_set(&timers, &c->timer, now_ns());
    }
}

/* An id of its own, for a call that will be left. */
static void mark_request(struct conn *c) {
    static uint32_t count;
    char digits[ID_DIGITS + 1];
    c->id = (uint64_t)getpid() << 32 | ++count;
    snprintf(digits, sizeof digits, "%016llx", (unsigned long long)c->id);
    c->own = grown(c->own, c->request->length);
    memcpy(c->own, c->request->bytes, c->request->length);
    memcpy(c->own + c->request->id_at, digits, ID_DIGITS);
}

static void call_begin(struct conn *c, uint64_t due_ns) {
    c->request = !c->request || c->request == c->last ? c->first : c->request + 1;
    c->phase = BUSY;
    c->due_ns = due_ns;
    c->sent = c->carry_length = 0;
    c->chunk_ns = c->sequence = 0;
    c->head_read = c->body_begun = c->terminal = c->closes = c->failed = false;
    if (c->request->id_at) mark_request(c);
    push(c);
}

/* Closed connections keep their port for a while: many sources have ports enough. */
static void spread_source(int fd) {
    static uint32_t count;
    struct sockaddr_in source = {.sin_family = AF_INET,
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK + ++count % SOURCES)};
    int on = 1;
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&source, sizeof source)) die("load: bind");
}

static void call_open(struct conn *c, uint64_t due_ns) {
    c->due_ns = due_ns;
    c->used = false;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("load: socket");
    int on = 1, little = 4096;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (mode->fresh) spread_source(c->fd);
    if (mode->stops) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event)) die("load: epoll_ctl");
    c->phase = CONNECTING;
    ++measured.connects;
    if (connect(c->fd, (struct sockaddr *)&target, sizeof target) && errno != EINPROGRESS) {
        char kind[40];
        snprintf(kind, sizeof kind, "connect_%s", strerrorname_np(errno));
        call_failed(c, kind);
    }
}

/* ---- receiving ---- */

static void carry(struct conn *c, const char *bytes, size_t length) {
    if (c->carry_length + length > c->carry_room) {
        c->carry_room = c->carry_length + length + 512;
        c->carry = grown(c->carry, c->carry_room);
    }
    put(c->carry + c->carry_length, bytes, length);
    c->carry_length += length;
}

static void call_error(struct conn *c, const char *kind, uint64_t times) {
    count_error(kind, times);
    c->failed = true;
}

static void on_chunk(struct conn *c, uint64_t sequence, uint64_t stamp, uint64_t now) {
    if (sequence > c->sequence + 1) call_error(c, "missing", sequence - c->sequence - 1);
    if (sequence <= c->sequence) call_error(c, "repeated", 1);
    if (c->terminal) call_error(c, "after_terminal", 1);
    if (sequence > c->sequence) c->sequence = sequence;
    if (counts(now) && !c->background) {
        ++measured.chunks;
        if (stamp > now) call_error(c, "bad_stamp", 1);
        else if (counts(stamp)) histogram_add(&measured.delay, now - stamp);
        if (counts(c->chunk_ns)) histogram_add(&measured.gap, now - c->chunk_ns);
    }
    if (mode->held && !c->background && !c->stood) {
        c->stood = true;
        ++standing;
    }
    if (!c->chunk_ns && mode->leaves) {
        c->wake = LEAVE;
        timer_set(&timers, &c->timer, now + asked.after_us * US);
    }
    c->chunk_ns = now;
    if (mode->stops && c->sequence >= STOP_AFTER) c->phase = STOPPED;
}

/* One line of the answer; true if it is a chunk of text. */
static bool on_line(struct conn *c, const char *line, size_t length, uint64_t now) {
    const char *end = line + length;
    if (!length || *line == '\r') return false;
    bool ends = find(line, length, c->request->streamed ? "data: [DONE]" : "\"finish_reason\":\"stop\"") ||
                find(line, length, "\"done\":true");
    const char *text = find(line, length, c->request->marker);
    if (text) text += strlen(c->request->marker);
    bool chunk = text && text < end && *text >= '0' && *text <= '9';
    if (chunk) {
        uint64_t sequence = take_number(&text, end);
        if (text < end) ++text;
        on_chunk(c, sequence, take_number(&text, end), now);
    }
    if (ends) {
        if (c->terminal) call_error(c, "after_terminal", 1);
        c->terminal = true;
    } else if (!chunk) {
        if (find(line, length, "\"error\"")) call_error(c, "error_record", 1);
        else ++measured.fillers; /* a heartbeat, a comment, the reason of the end */
    }
    return chunk;
}

/* Splits payload into lines; returns how many chunks it completed. */
static uint64_t on_payload(struct conn *c, const char *bytes, size_t length, uint64_t now) {
    uint64_t chunks = 0;
    for (const char *end = bytes + length; bytes < end;) {
        const char *stop = memchr(bytes, '\n', (size_t)(end - bytes));
        if (!stop || c->carry_length) carry(c, bytes, (size_t)((stop ? stop : end) - bytes));
        if (!stop) break;
        if (c->carry_length) chunks += on_line(c, c->carry, c->carry_length, now);
        else chunks += on_line(c, bytes, (size_t)(stop - bytes), now);
        c->carry_length = 0;
        bytes = stop + 1;
    }
    return chunks;
}

static void call_ended(struct conn *c, uint64_t now) {
    const struct request *request = c->request;
    if (request->stamped && !c->terminal) call_error(c, "no_terminal", 1);
    if (request->stamped && c->sequence < request->n) call_error(c, "missing", request->n - c->sequence);
    if (request->stamped && c->sequence > request->n) call_error(c, "too_many", 1);
    if (!request->stamped && c->last_byte != '}') call_error(c, "bad_body", 1);
    if (c->sent < request->length) {
        call_failed(c, "early_answer");
        return;
    }
    if (counts(mode->flow == LOOP ? now : c->due_ns) && !c->failed) {
        ++*(c->background ? &measured.background_calls : &measured.calls);
        if (!c->background) histogram_add(&measured.total, now - c->due_ns);
    }
    c->used = true;
    if (mode->fresh || c->closes || c->background) {
        conn_close(c);
        conn_renew(c, c->background ? c->due_ns + UPLOAD_PACE : now);
    } else if (mode->flow == ARRIVALS) {
        rest(c);
    } else if (stopping) {
        conn_close(c);
    } else {
        call_begin(c, now);
    }
}

static bool parse_head(struct conn *c, const char *head, size_t length) {
    if (length < 12 || memcmp(head, "HTTP/1.1 ", 9)) return false;
    const char *digits = head + 9, *end = head + length;
    uint64_t status = take_number(&digits, end);
    if (status < 200) return true; /* an interim answer: the next head follows */
    const char *line_end = memchr(head, '\n', length);
    struct framing f = read_framing(line_end + 1, end);
    c->closes = f.close || !(f.chunked || f.has_length);
    c->body = (struct body){.kind = f.chunked ? BODY_CHUNKED : f.has_length ? BODY_LENGTH : BODY_TO_EOF,
                            .left = f.chunked ? 0 : f.length};
    c->body.done = f.has_length && !f.chunked && !f.length;
    c->head_read = true;
    c->status = (int)status;
    return true;
}

/* Takes a head; returns how many of these bytes belong to it, -1 if the call cannot go on. */
static ssize_t on_head(struct conn *c, const char *bytes, size_t length) {
    size_t before = c->carry_length;
    if (before) carry(c, bytes, length);
    const char *all = before ? c->carry : bytes;
    size_t size = before ? c->carry_length : length;
    const char *end = find(all, size, "\r\n\r\n");
    if (!end) {
        if (!before) carry(c, bytes, length);
        return size < HEAD_LIMIT ? (ssize_t)length : -1;
    }
    size_t head_length = (size_t)(end + 4 - all);
    c->carry_length = 0;
    return parse_head(c, all, head_length - 2) ? (ssize_t)(head_length - before) : -1;
}

/* An answer that is none; the first of them is shown. */
static void refused(struct conn *c, const char *bytes, size_t length) {
    static bool told;
    char kind[40];
    snprintf(kind, sizeof kind, "status_%d", c->status);
    if (!told) fprintf(stderr, "load: %s: %.*s\n", kind, (int)(length < 300 ? length : 300), bytes);
    told = true;
    call_failed(c, kind);
}

static void on_bytes(struct conn *c, const char *bytes, size_t length, uint64_t now) {
    uint64_t chunks = 0;
    while (!c->head_read && length) {
        ssize_t taken = on_head(c, bytes, length);
        if (taken < 0) {
            call_failed(c, "bad_head");
            return;
        }
        bytes += taken;
        length -= (size_t)taken;
    }
    if (c->head_read && c->status != 200) {
        refused(c, bytes, length);
        return;
    }
    while (length && !c->body.done && !c->body.bad) {
        const char *piece;
        size_t piece_length, taken = body_take(&c->body, bytes, length, &piece, &piece_length);
        bytes += taken;
        length -= taken;
        if (!piece_length) continue;
        if (!c->body_begun && counts(mode->flow == LOOP ? now : c->due_ns) && !c->background)
            histogram_add(&measured.ttfb, now - c->due_ns);
        c->body_begun = true;
        c->last_byte = piece[piece_length - 1];
        if (c->request->stamped) chunks += on_payload(c, piece, piece_length, now);
    }
    bool done = c->head_read && c->body.done;
    if (done && c->carry_length) chunks += on_line(c, c->carry, c->carry_length, now);
    if (chunks && counts(now) && !c->background) ++measured.reads;
    if (c->body.bad) call_failed(c, "bad_chunking");
    else if (done && length) call_failed(c, "surplus_bytes");
    else if (done) call_ended(c, now);
}

static void on_end(struct conn *c, bool reset, uint64_t now) {
    if (c->head_read && c->body.kind == BODY_TO_EOF && !reset) {
        if (c->carry_length) on_line(c, c->carry, c->carry_length, now);
        call_ended(c, now);
    } else if (c->used && !c->head_read) {
        call_failed(c, "stale_connection");
    } else {
        call_failed(c, reset ? "reset" : "closed_early");
    }
}

/* Reads until a read did not fill the buffer, or until the end where one was announced. */
static void pull(struct conn *c, bool to_end) {
    uint32_t epoch = c->epoch;
    while (c->phase == BUSY && c->epoch == epoch) {
        ssize_t n = recv(c->fd, input, sizeof input, 0);
        if (n < 0 && errno == EAGAIN) return;
        uint64_t now = now_ns();
        if (n <= 0) {
            on_end(c, n < 0, now);
            return;
        }
        if (counts(now)) measured.bytes += (uint64_t)n;
        on_bytes(c, input, (size_t)n, now);
        if (n < READ_SIZE && !to_end) return;
    }
}

/* ---- events ---- */

static void on_connect(struct conn *c) {
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (!error) {
        call_begin(c, c->due_ns);
        return;
    }
    char kind[40];
    snprintf(kind, sizeof kind, "connect_%s", strerrorname_np(error));
    call_failed(c, kind);
}

static void on_event(struct conn *c, uint32_t events) {
    uint32_t broken = events & (EPOLLERR | EPOLLHUP);
    if (c->phase == CONNECTING) {
        if (events & EPOLLOUT || broken) on_connect(c);
    } else if (c->phase == RESTING) {
        if (!broken && !(events & EPOLLRDHUP)) return;
        ++measured.idle_closed;
        rest_ended(c);
        conn_close(c);
        conn_free(c);
    } else if (c->phase == STOPPED) {
        if (broken) call_failed(c, "closed_early");
    } else if (c->phase == BUSY) {
        uint32_t epoch = c->epoch;
        if (events & EPOLLOUT && c->sent < c->request->length) push(c);
        if (c->epoch == epoch && events & (EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP))
            pull(c, broken || events & EPOLLRDHUP);
    }
}

static void leave(struct conn *c) {
    uint64_t now = now_ns();
    conn_close(c);
    if (counts(c->due_ns)) {
        count_abort(c->id, now);
        ++measured.calls;
    }
    conn_renew(c, now);
}

static void on_timer(struct conn *c) {
    if (c->wake == OPEN) call_open(c, c->timer.due_ns);
    else if (c->wake == LEAVE) leave(c);
    else if (c->phase == BUSY) push(c);
}

static void on_arrival(void) {
    uint64_t due_ns = arrival.due_ns;
    timer_set(&timers, &arrival, due_ns + (uint64_t)(random_exponential(&randomness) / asked.rate * 1e9));
    ++in_flight;
    if (resting_count) {
        struct conn *c = resting[resting_count - 1];
        rest_ended(c);
        call_begin(c, due_ns);
        return;
    }
    struct conn *c = free_conns;
    if (c) {
        free_conns = c->next_free;
    } else {
        c = calloc(1, sizeof *c);
        if (!c) die("load: calloc");
        c->first = c->last = requests;
    }
    call_open(c, due_ns);
}

static void run_once(uint64_t until_ns) {
    struct epoll_event events[512];
    uint64_t now = now_ns(), due = until_ns;
    if (timers.count && timers.at[1]->due_ns < due) due = timers.at[1]->due_ns;
    uint64_t left = due > now ? due - now : 0;
    struct timespec timeout = {.tv_sec = (time_t)(left / SECOND), .tv_nsec = (long)(left % SECOND)};
    int count = epoll_pwait2(epoll_fd, events, 512, &timeout, NULL);
    if (count < 0 && errno != EINTR) die("load: epoll_pwait2");
    for (int i = 0; i < count; ++i) on_event(events[i].data.ptr, events[i].events);
    now = now_ns();
    for (struct timer *timer; (timer = timer_due(&timers, now));) {
        if (timer == &arrival) on_arrival();
        else on_timer((struct conn *)timer);
    }
}

static void run_until(uint64_t ns) {
    while (now_ns() < ns) run_once(ns);
}

/* ---- a run ---- */

static void start(uint64_t now) {
    if (mode->flow == ARRIVALS) {
        timer_set(&timers, &arrival, now);
        return;
    }
    bool mixed = !strcmp(mode->name, "mix");
    uint64_t streams = either(asked.conns, mode->conns, 1);
    uint64_t ramp_ns = mode->held ? (uint64_t)(asked.warmup * 0.8e9) : 0;
    if (mode->held && ramp_ns < streams * RAMP_STEP) ramp_ns = streams * RAMP_STEP;
    held = mode->held ? streams : 0;
    conn_count = streams + (mixed ? UPLOADERS : 0);
    conns = calloc(conn_count, sizeof *conns);
    if (!conns) die("load: calloc");
    for (uint64_t i = 0; i < conn_count; ++i) {
        struct conn *c = &conns[i];
        c->background = i >= streams;
        c->first = c->background ? requests + 1 : requests;
        c->last = c->background ? requests + KINDS - 1 : requests;
        conn_reopen(c, now + ramp_ns * (c->background ? streams : i) / streams);
    }
}

/* The warm-up of held streams lasts until all of them stand. */
static void await_standing(void) {
    for (uint64_t end = now_ns() + STANDING_WAIT; standing < held && now_ns() < end;)
        run_until(now_ns() + 50 * MS);
}

/* Streams that are held must stand and flow until the end. */
static void check_held(uint64_t now) {
    uint64_t interval_ns = either(asked.interval_us, mode->interval_us, 0) * US;
    for (uint64_t i = 0; i < conn_count; ++i) {
        struct conn *c = &conns[i];
        if (!mode->held || c->background || c->phase == STOPPED) continue;
        if (c->phase != BUSY || !c->chunk_ns) count_error("no_answer", 1);
        else if (now - c->chunk_ns > 2 * interval_ns + SECOND) count_error("stalled", 1);
    }
}

static void drain(void) {
    stopping = true;
    timer_clear(&timers, &arrival);
    if (mode->flow != ARRIVALS) return;
    for (uint64_t end = now_ns() + DRAIN; in_flight && now_ns() < end;) run_once(end);
    if (in_flight) count_error("unfinished", in_flight);
}

static void prepare(void) {
    const char *what = asked.what ? asked.what : mode->what;
    requests[0] = request_of(what_named(what), true);
    if (strcmp(mode->name, "mix")) return;
    requests[1] = request_of(what_named("upload"), false);
    requests[2] = request_of(what_named("numbers"), false);
    requests[3] = request_of(what_named("numbers5m"), false);
}

static double own_cpu_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void report(const double *cpu_s, double own_s) {
    double seconds = (double)(window.to_ns - window.from_ns) / 1e9;
    uint64_t interval_us = either(asked.interval_us, mode->interval_us, 0);
    printf("{\"mode\":\"%s\",\"what\":\"%s\",\"seconds\":%.6f", mode->name,
           asked.what ? asked.what : mode->what, seconds);
    print_number("conns", conn_count);
    print_number("standing", standing);
    if (mode->held && interval_us && !mode->stops) {
        uint64_t streams = either(asked.conns, mode->conns, 1);
        print_number("expected_chunks", (uint64_t)((double)streams * seconds * 1e6 / (double)interval_us));
    }
    print_measured();
    printf(",\"load_cpu_s\":%.6f,\"cpu_s\":{", own_s);
    for (size_t i = 0; i < asked.pid_count; ++i)
        printf("%s\"%d\":%.6f", i ? "," : "", asked.pids[i], cpu_s[i]);
    puts("}}");
}

static void measure(void) {
    double cpu_s[PIDS], own_s;
    uint64_t begin = now_ns();
    start(begin);
    run_until(begin + (uint64_t)(asked.warmup * 1e9));
    await_standing();
    for (size_t i = 0; i < asked.pid_count; ++i) cpu_s[i] = tree_cpu_s(asked.pids[i]);
    own_s = own_cpu_s();
    window.from_ns = now_ns();
    run_until(window.from_ns + (uint64_t)(asked.seconds * 1e9));
    window.to_ns = now_ns();
    own_s = own_cpu_s() - own_s;
    for (size_t i = 0; i < asked.pid_count; ++i) cpu_s[i] = tree_cpu_s(asked.pids[i]) - cpu_s[i];
    check_held(window.to_ns);
    drain();
    report(cpu_s, own_s);
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && take_option(argv[i], argv[i + 1])) continue;
        fprintf(stderr, "load: cannot use %s\n", argv[i]);
        return 2;
    }
    for (size_t i = 0; asked.mode && i < sizeof modes / sizeof *modes; ++i)
        if (!strcmp(modes[i].name, asked.mode)) mode = &modes[i];
    if (!mode || !asked.port) {
        fputs("usage: load --port P --mode M --seconds S [options]\n", stderr);
        return 2;
    }
    raise_descriptor_limit();
    prctl(PR_SET_TIMERSLACK, 1);
    randomness = asked.seed;
    target = (struct sockaddr_in){.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)asked.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    prepare();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    measure();
    return 0;
}
