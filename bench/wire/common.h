/* What the origin and the load generator of the benchmark share.
 *
 * Clock and random numbers, a heap of timers, the few rules of HTTP/1.1 that
 * both ends need, and a latency histogram. Header only: each program is one
 * translation unit, built with `cc -O2` and nothing beyond libc.
 *
 * Laws: time is CLOCK_MONOTONIC in nanoseconds, so a stamp written by one
 * process is comparable in the other; nothing here touches a socket.
 */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <time.h>

#define MODEL "bench:latest"
#define US 1000ull
#define MS 1000000ull
#define SECOND 1000000000ull

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static inline void *grown(void *memory, size_t bytes) {
    void *bigger = realloc(memory, bytes);
    if (!bigger) die("realloc");
    return bigger;
}

/* A descriptor per stream: as many as the machine allows. */
static inline void raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) die("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit)) die("setrlimit");
}

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

/* ---- random numbers: splitmix64, seeded, so that a run can be repeated ---- */

static inline uint64_t random_next(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Uniform in (0, 1]: never 0, so its logarithm is finite. */
static inline double random_unit(uint64_t *state) {
    return (double)((random_next(state) >> 11) + 1) / 9007199254740992.0;
}

/* Exponential with mean 1, by comparisons alone (von Neumann's way): no libm is needed. */
static inline double random_exponential(uint64_t *state) {
    for (double whole = 0;; ++whole) {
        double first = random_unit(state), last = first;
        bool odd = true;
        for (double next; (next = random_unit(state)) < last; last = next) odd = !odd;
        if (odd) return whole + first;
    }
}

/* ---- text: appending without printf, for what is rendered per record ---- */

static inline char *put(char *at, const char *text, size_t length) {
    memcpy(at, text, length);
    return at + length;
}

static inline char *put_text(char *at, const char *text) {
    return put(at, text, strlen(text));
}

static inline char *put_number(char *at, uint64_t number) {
    char digits[20];
    int i = 20;
    do digits[--i] = (char)('0' + number % 10);
    while (number /= 10);
    return put(at, digits + i, (size_t)(20 - i));
}

/* Reads digits; *at is left on the first other byte. */
static inline uint64_t take_number(const char **at, const char *end) {
    uint64_t number = 0;
    for (; *at < end && **at >= '0' && **at <= '9'; ++*at)
        number = number * 10 + (uint64_t)(**at - '0');
    return number;
}

static inline const char *find(const char *in, size_t length, const char *what) {
    return memmem(in, length, what, strlen(what));
}

/* ---- timers: a binary heap keyed on the due time ---- */

struct timer {
    uint64_t due_ns;
    size_t slot; /* place in the heap, from 1; 0 = not armed */
};

struct heap {
    struct timer **at; /* at[0] is unused */
    size_t count, room;
};

static inline void heap_place(struct heap *heap, size_t slot, struct timer *timer) {
    heap->at[slot] = timer;
    timer->slot = slot;
}

static inline void heap_sift(struct heap *heap, size_t slot, struct timer *timer) {
    for (; slot > 1 && heap->at[slot / 2]->due_ns > timer->due_ns; slot /= 2)
        heap_place(heap, slot, heap->at[slot / 2]);
    for (size_t child; (child = slot * 2) <= heap->count; slot = child) {
        if (child < heap->count && heap->at[child + 1]->due_ns < heap->at[child]->due_ns) ++child;
        if (heap->at[child]->due_ns >= timer->due_ns) break;
        heap_place(heap, slot, heap->at[child]);
    }
    heap_place(heap, slot, timer);
}

static inline void timer_clear(struct heap *heap, struct timer *timer) {
    size_t slot = timer->slot;
    if (!slot) return;
    struct timer *last = heap->at[heap->count--];
    timer->slot = 0;
    if (last != timer) heap_sift(heap, slot, last);
}

static inline void timer_set(struct heap *heap, struct timer *timer, uint64_t due_ns) {
    timer->due_ns = due_ns;
    if (timer->slot) {
        heap_sift(heap, timer->slot, timer);
        return;
    }
    if (heap->count + 1 >= heap->room) {
        heap->room = heap->room ? heap->room * 2 : 1024;
        heap->at = grown(heap->at, heap->room * sizeof *heap->at);
    }
    heap_sift(heap, ++heap->count, timer);
}

/* The earliest timer if it is due, taken off the heap; else NULL. */
static inline struct timer *timer_due(struct heap *heap, uint64_t now) {
    if (!heap->count || heap->at[1]->due_ns > now) return NULL;
    struct timer *first = heap->at[1];
    timer_clear(heap, first);
    return first;
}

/* ---- HTTP: the headers that frame a message, and its body as it arrives ---- */

struct framing {
    uint64_t length;
    bool has_length, chunked, close, expects_continue;
};

static inline bool header_is(const char *line, size_t length, const char *name) {
    size_t n = strlen(name);
    return length > n && line[n] == ':' && !strncasecmp(line, name, n);
}

static inline bool value_has(const char *line, size_t length, const char *token) {
    size_t n = strlen(token);
    for (size_t i = 0; i + n <= length; ++i)
        if (!strncasecmp(line + i, token, n)) return true;
    return false;
}

/* Reads the header lines between the start line and the empty line. */
static inline struct framing read_framing(const char *at, const char *end) {
    struct framing f = {0};
    while (at < end) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        size_t length = (size_t)((stop ? stop : end) - at);
        if (header_is(at, length, "content-length")) {
            const char *digits = at + sizeof "content-length:" - 1;
            while (digits < end && *digits == ' ') ++digits;
            f.length = take_number(&digits, end);
            f.has_length = true;
        } else if (header_is(at, length, "transfer-encoding")) {
            f.chunked = value_has(at, length, "chunked");
        } else if (header_is(at, length, "connection")) {
            f.close = value_has(at, length, "close");
        } else if (header_is(at, length, "expect")) {
            f.expects_continue = true;
        }
        at += length + 1;
    }
    return f;
}

struct body {
    enum { BODY_LENGTH, BODY_CHUNKED, BODY_TO_EOF } kind;
    enum { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_END, TRAILER_START, TRAILER } state;
    uint64_t left;  /* bytes of the body or of the current chunk */
    bool done, bad; /* bad: the chunked framing is broken */
};

static inline int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* One byte of chunked framing (never of payload). */
static inline void chunk_byte(struct body *body, char c) {
    int digit = hex_digit(c);
    switch (body->state) {
    case CHUNK_SIZE:
        if (digit >= 0) {
            body->left = body->left * 16 + (uint64_t)digit;
            return;
        }
        body->state = CHUNK_EXTENSION;
        /* fall through */
    case CHUNK_EXTENSION:
        if (c == '\n') body->state = body->left ? CHUNK_DATA : TRAILER_START;
        return;
    case CHUNK_END:
        if (c == '\n') body->state = CHUNK_SIZE;
        else if (c != '\r') body->bad = true;
        return;
    case TRAILER_START:
        if (c == '\n') body->done = true;
        else if (c != '\r') body->state = TRAILER;
        return;
    case TRAILER:
        if (c == '\n') body->state = TRAILER_START;
        return;
    case CHUNK_DATA: /* payload: taken by body_take */
        return;
    }
}

/* Takes some bytes of a body: returns how many, and which of them are payload. */
static inline size_t body_take(struct body *body, const char *in, size_t length,
                               const char **piece, size_t *piece_length) {
    size_t at = 0;
    *piece_length = 0;
    if (body->kind == BODY_CHUNKED && body->state != CHUNK_DATA) {
        while (at < length && body->state != CHUNK_DATA && !body->done && !body->bad)
            chunk_byte(body, in[at++]);
        return at;
    }
    *piece = in;
    *piece_length = length < body->left || body->kind == BODY_TO_EOF ? length : (size_t)body->left;
    if (body->kind == BODY_TO_EOF) return length;
    body->left -= *piece_length;
    if (!body->left) {
        if (body->kind == BODY_CHUNKED) body->state = CHUNK_END;
        else body->done = true;
    }
    return *piece_length;
}

/* ---- histogram: log-linear, 128 buckets per power of two, error below 0.4 % ---- */

#define HISTOGRAM_BITS 7
#define HISTOGRAM_SIZE ((64 - HISTOGRAM_BITS + 1) << HISTOGRAM_BITS)

struct histogram {
    uint64_t count, max;
    double sum;
    uint64_t buckets[HISTOGRAM_SIZE];
};

static inline void histogram_add(struct histogram *h, uint64_t value) {
    size_t index = (size_t)value;
    if (value >> HISTOGRAM_BITS) {
        int shift = 63 - __builtin_clzll(value) - HISTOGRAM_BITS;
        index = ((size_t)shift << HISTOGRAM_BITS) + (size_t)(value >> shift);
    }
    ++h->buckets[index];
    ++h->count;
    h->sum += (double)value;
    if (value > h->max) h->max = value;
}

/* The middle of a bucket. */
static inline uint64_t histogram_value(size_t index) {
    size_t shift = index >> HISTOGRAM_BITS;
    if (shift-- < 2) return index;
    uint64_t low = (uint64_t)(index - (shift << HISTOGRAM_BITS)) << shift;
    return low + (1ull << shift) / 2;
}

static inline uint64_t histogram_at(const struct histogram *h, double quantile) {
    uint64_t rank = (uint64_t)(quantile * (double)h->count), seen = 0;
    for (size_t i = 0; i < HISTOGRAM_SIZE; ++i) {
        seen += h->buckets[i];
        if (seen > rank) return histogram_value(i) < h->max ? histogram_value(i) : h->max;
    }
    return h->max;
}

#endif
