/* What the load generator is asked for: its modes and arguments, and the requests they make.
 *
 * Laws: a request is rendered once, before the run; only the id of a call that will be left is
 * written into a copy; bodies are what chat clients send: prose with escapes, model first, the
 * stream flag last.
 */
#ifndef BENCH_ASKED_H
#define BENCH_ASKED_H

#include "common.h"

#define ENDLESS 1000000000ull
#define SILENT_DELAY_US 3600000000ull

enum { PIDS = 16, ID_DIGITS = 16 };

/* ---- what is asked for ---- */

struct mode {
    const char *name, *what;
    enum { LOOP, ARRIVALS } flow;
    bool fresh;  /* a connection per call */
    bool held;   /* opened one after the other, meant to last */
    bool stops;  /* reads no more after some chunks */
    bool leaves; /* closes before the end */
    uint64_t conns, n, interval_us, size, delay_us;
};

static const struct mode modes[] = {
    {"closed", "chat", LOOP, .conns = 64},
    {"churn", "tags", LOOP, .conns = 16, .fresh = true},
    {"rate", "first", ARRIVALS, .conns = 0},
    {"streams", "stream", LOOP, .conns = 100, .held = true, .n = ENDLESS, .interval_us = 20000},
    {"short", "stream", LOOP, .conns = 64, .n = 20, .interval_us = 5000},
    {"burst", "stream", LOOP, .conns = 16, .n = 2000},
    {"abort", "stream", ARRIVALS, .fresh = true, .leaves = true, .n = ENDLESS, .interval_us = 20000},
    {"abort-idle", "stream", ARRIVALS, .fresh = true, .leaves = true, .n = 1, .delay_us = SILENT_DELAY_US},
    {"upload", "upload", LOOP, .conns = 4},
    {"idle", "stream", LOOP, .conns = 1000, .held = true, .n = ENDLESS, .interval_us = 30000000},
    {"slow", "stream", LOOP, .conns = 20, .held = true, .stops = true, .n = ENDLESS, .size = 1000},
    {"mix", "stream", LOOP, .conns = 100, .held = true, .n = ENDLESS, .interval_us = 20000},
};

enum shape { GET, TEXT, EMBED, IMAGE, NUMBERS };

/* Kinds of calls; `bytes` is about the size of the request's body. */
struct what {
    const char *name, *path;
    enum shape shape;
    bool streamed;
    uint64_t bytes, n, interval_us;
};

static const struct what whats[] = {
    {"tags", "/api/tags", GET, false, 0, 0, 0},
    {"version", "/api/version", GET, false, 0, 0, 0},
    {"chat", "/api/chat", TEXT, false, 2000, 1, 0},
    {"chat50k", "/api/chat", TEXT, false, 50000, 1, 0},
    {"embed", "/api/embed", EMBED, false, 2000, 0, 0},
    {"first", "/api/chat", TEXT, true, 2000, 2, 1000},
    {"stream", "/api/chat", TEXT, true, 2000, 1, 0},
    {"upload", "/api/generate", IMAGE, false, 20000000, 1, 0},
    {"numbers", "/api/generate", NUMBERS, false, 1000000, 1, 0},
    {"numbers5m", "/api/generate", NUMBERS, false, 5000000, 1, 0},
};

static struct {
    const char *mode, *what, *path, *auth;
    double seconds, warmup, rate;
    uint64_t port, conns, interval_us, after_us, n, size, delay_us, cut, status, seed;
    int pids[PIDS];
    size_t pid_count;
} asked = {.seconds = 3, .warmup = 1, .rate = 100, .after_us = 100000, .seed = 1, .status = 200,
           .conns = UINT64_MAX, .interval_us = UINT64_MAX, .n = UINT64_MAX, .size = UINT64_MAX,
           .delay_us = UINT64_MAX};

static const struct mode *mode;

/* ---- requests ---- */

struct request {
    char *bytes;
    size_t length, id_at;
    bool streamed, stamped; /* stamped: the answer bears numbered chunks */
    uint64_t n;
    const char *marker; /* what stands before the text of a chunk */
};

static char *put_prose(char *at, uint64_t bytes) {
    static const char prose[] = "The river \\\"carries\\\" its stones a little further every year.\\n"
                                "Nobody in the town had counted them, but everyone had an opinion. ";
    for (; bytes > sizeof prose; bytes -= sizeof prose - 1) at = put(at, prose, sizeof prose - 1);
    return at;
}

static char *put_messages(char *at, const char *script, uint64_t bytes) {
    at += sprintf(at, "\"messages\":[{\"role\":\"user\",\"content\":\"%s ", script);
    for (; bytes > 2000; bytes -= 1000) {
        at = put_text(put_prose(at, 1000), "\"},{\"role\":\"assistant\",\"content\":\"");
        at = put_text(put_prose(at, 1000), "\"},{\"role\":\"user\",\"content\":\"");
        bytes -= 1000;
    }
    return put_text(put_prose(at, bytes), "\"}]");
}

static char *put_image(char *at, uint64_t bytes) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint64_t seed = 5;
    at = put_text(at, ",\"images\":[\"");
    for (uint64_t i = 0; i < bytes; ++i) *at++ = digits[random_next(&seed) >> 58];
    return put_text(at, "\"]");
}

static char *put_numbers(char *at, uint64_t bytes) {
    uint64_t seed = 5;
    at = put_text(at, ",\"context\":[");
    for (char *end = at + bytes; at < end; *at++ = ',') at = put_number(at, random_next(&seed) % 128000);
    at[-1] = ']';
    return at;
}

static char *put_body(char *at, const struct what *what, const char *path, const char *script) {
    at = put_text(at, "{\"model\":\"" MODEL "\",");
    bool prompt = strstr(path, "generate");
    if (what->shape == EMBED) at = put_prose(at + sprintf(at, "\"input\":\"%s ", script), what->bytes);
    else if (what->shape != TEXT) at += sprintf(at, "\"prompt\":\"%s ", script);
    else if (prompt) at = put_prose(at + sprintf(at, "\"prompt\":\"%s ", script), what->bytes);
    else at = put_messages(at, script, what->bytes);
    if (what->shape != TEXT || prompt) *at++ = '"';
    if (what->shape == IMAGE) at = put_image(at, what->bytes);
    if (what->shape == NUMBERS) at = put_numbers(at, what->bytes);
    if (what->shape != EMBED) at = put_text(at, what->streamed ? ",\"stream\":true" : ",\"stream\":false");
    return put(at, "}", 1);
}

static const struct what *what_named(const char *name) {
    for (size_t i = 0; i < sizeof whats / sizeof *whats; ++i)
        if (!strcmp(whats[i].name, name)) return &whats[i];
    fprintf(stderr, "load: unknown --what %s\n", name);
    exit(2);
}

static uint64_t either(uint64_t given, uint64_t mode_says, uint64_t otherwise) {
    return given != UINT64_MAX ? given : mode_says ? mode_says : otherwise;
}

/* The script of a call. The leading kind is the one that options speak of; the others go beside it. */
static char *put_script(char *at, const struct what *what, bool leading, uint64_t n) {
    at = put_number(put_text(at, "#bench n="), n);
    uint64_t us = leading ? either(asked.interval_us, mode->interval_us, what->interval_us) : 0;
    at = put_number(put_text(at, " us="), us);
    at = put_number(put_text(at, " delay="), leading ? either(asked.delay_us, mode->delay_us, 0) : 0);
    at = put_number(put_text(at, " size="), either(asked.size, mode->size, 32));
    at = put_number(put_text(at, " status="), leading ? asked.status : 200);
    at = put_number(put_text(at, " cut="), leading ? asked.cut : 0);
    if (mode->leaves) at += sprintf(at, " id=%0*d", ID_DIGITS, 0); /* filled in per call */
    return put(at, "#", 2);
}

static char *put_request_head(char *at, const char *path, size_t length) {
    at += sprintf(at, "%s %s HTTP/1.1\r\n", length ? "POST" : "GET", path);
    at += sprintf(at, "Host: 127.0.0.1:%d\r\n", (int)asked.port);
    at = put_text(at, "User-Agent: bench-load/1\r\nAccept: */*\r\n");
    if (asked.auth) at += sprintf(at, "Authorization: Bearer %s\r\n", asked.auth);
    if (length) at += sprintf(at, "Content-Type: application/json\r\nContent-Length: %zu\r\n", length);
    return put_text(at, "\r\n");
}

static struct request request_of(const struct what *what, bool leading) {
    const char *path = leading && asked.path ? asked.path : what->path;
    uint64_t n = leading ? either(asked.n, mode->n, what->n) : what->n;
    char script[256], *body = grown(NULL, what->bytes * 2 + 4096);
    char *bytes = grown(NULL, what->bytes * 2 + 8192);
    put_script(script, what, leading, n);
    size_t length = what->shape == GET ? 0 : (size_t)(put_body(body, what, path, script) - body);
    char *at = put(put_request_head(bytes, path, length), body, length);
    free(body);
    const char *id = find(bytes, (size_t)(at - bytes), " id=");
    return (struct request){
        .bytes = bytes,
        .length = (size_t)(at - bytes),
        .id_at = id ? (size_t)(id + 4 - bytes) : 0,
        .streamed = what->streamed,
        .stamped = what->n > 0,
        .n = n,
        .marker = strstr(path, "generate") ? "\"response\":\"" : "\"content\":\"",
    };
}

/* ---- arguments ---- */

static const struct {
    const char *name;
    enum { WORD, WHOLE, REAL } type;
    void *into;
} options[] = {
    {"--mode", WORD, &asked.mode},         {"--what", WORD, &asked.what},
    {"--path", WORD, &asked.path},         {"--auth", WORD, &asked.auth},
    {"--seconds", REAL, &asked.seconds},   {"--warmup", REAL, &asked.warmup},
    {"--rate", REAL, &asked.rate},         {"--port", WHOLE, &asked.port},
    {"--conns", WHOLE, &asked.conns},      {"--interval-us", WHOLE, &asked.interval_us},
    {"--after-us", WHOLE, &asked.after_us}, {"--n", WHOLE, &asked.n},
    {"--size", WHOLE, &asked.size},        {"--delay-us", WHOLE, &asked.delay_us},
    {"--cut", WHOLE, &asked.cut},          {"--status", WHOLE, &asked.status},
    {"--seed", WHOLE, &asked.seed},
};

static bool take_option(const char *name, const char *value) {
    if (!strcmp(name, "--pid") && asked.pid_count < PIDS) {
        asked.pids[asked.pid_count++] = atoi(value);
        return true;
    }
    for (size_t i = 0; i < sizeof options / sizeof *options; ++i) {
        if (strcmp(options[i].name, name)) continue;
        if (options[i].type == WORD) *(const char **)options[i].into = value;
        else if (options[i].type == REAL) *(double *)options[i].into = atof(value);
        else *(uint64_t *)options[i].into = strtoull(value, NULL, 10);
        return true;
    }
    return false;
}

#endif
