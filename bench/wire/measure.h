/* What the load generator measures: counters, histograms, errors by kind, CPU of the proxy.
 *
 * Laws: only what falls into the window [window.from_ns, window.to_ns) is counted, except errors,
 * which count from the first byte to the last; nothing is dropped silently.
 */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include "common.h"

#include <dirent.h>
#include <stdarg.h>

enum { ERROR_KINDS = 64 };

struct window {
    uint64_t from_ns, to_ns;
};

struct abort_made {
    uint64_t id, ns;
};

struct measured {
    uint64_t calls, background_calls, chunks, reads, bytes, sent_bytes;
    uint64_t connects, idle_closed, fillers;
    struct histogram ttfb, total, delay, gap;
    struct {
        char kind[40];
        uint64_t count;
    } errors[ERROR_KINDS];
    struct abort_made *aborts;
    size_t abort_count, abort_room;
};

static struct window window = {UINT64_MAX, UINT64_MAX};
static struct measured measured;

static inline bool counts(uint64_t ns) {
    return ns >= window.from_ns && ns < window.to_ns;
}

static inline void count_error(const char *kind, uint64_t times) {
    for (size_t i = 0; i < ERROR_KINDS; ++i) {
        if (!measured.errors[i].kind[0])
            snprintf(measured.errors[i].kind, sizeof measured.errors[i].kind, "%s", kind);
        if (strcmp(measured.errors[i].kind, kind)) continue;
        measured.errors[i].count += times;
        return;
    }
    fprintf(stderr, "load: too many kinds of errors, lost: %s\n", kind);
}

static inline void count_abort(uint64_t id, uint64_t ns) {
    if (measured.abort_count == measured.abort_room) {
        measured.abort_room = measured.abort_room ? measured.abort_room * 2 : 256;
        measured.aborts = grown(measured.aborts, measured.abort_room * sizeof *measured.aborts);
    }
    measured.aborts[measured.abort_count++] = (struct abort_made){id, ns};
}

/* ---- CPU: nanoseconds on a core, of a process and all its descendants ---- */

__attribute__((format(printf, 3, 4))) static inline bool read_proc(char *text, size_t room,
                                                                   const char *format, ...) {
    char path[128];
    va_list values;
    va_start(values, format);
    vsnprintf(path, sizeof path, format, values);
    va_end(values);
    FILE *file = fopen(path, "r");
    if (!file) return false;
    size_t length = fread(text, 1, room - 1, file);
    fclose(file);
    text[length] = 0;
    return true;
}

static inline double tree_cpu_s(int pid) {
    char path[64], text[16 << 10];
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    double sum = 0;
    for (struct dirent *task; tasks && (task = readdir(tasks));) {
        if (task->d_name[0] == '.') continue;
        if (read_proc(text, sizeof text, "%s/%.16s/schedstat", path, task->d_name))
            sum += strtod(text, NULL) / 1e9;
        if (!read_proc(text, sizeof text, "%s/%.16s/children", path, task->d_name)) continue;
        char *at = text;
        for (int child; (child = (int)strtol(at, &at, 10)) > 0;) sum += tree_cpu_s(child);
    }
    if (tasks) closedir(tasks);
    return sum;
}

/* ---- the report ---- */

static inline void print_histogram(const char *name, const struct histogram *h) {
    printf(",\"%s\":{\"count\":%llu", name, (unsigned long long)h->count);
    static const struct {
        const char *name;
        double at;
    } quantiles[] = {{"p50", .5}, {"p90", .9}, {"p99", .99}, {"p999", .999}};
    for (size_t i = 0; h->count && i < 4; ++i)
        printf(",\"%s\":%.1f", quantiles[i].name, (double)histogram_at(h, quantiles[i].at) / 1e3);
    double mean = h->count ? h->sum / (double)h->count : 0;
    if (h->count) printf(",\"max\":%.1f,\"mean\":%.1f", (double)h->max / 1e3, mean / 1e3);
    putchar('}');
}

static inline void print_number(const char *name, uint64_t number) {
    printf(",\"%s\":%llu", name, (unsigned long long)number);
}

static inline void print_measured(void) {
    const struct measured *m = &measured;
    print_number("calls", m->calls);
    print_number("background_calls", m->background_calls);
    print_number("chunks", m->chunks);
    print_number("reads", m->reads);
    print_number("bytes", m->bytes);
    print_number("sent_bytes", m->sent_bytes);
    print_number("connects", m->connects);
    print_number("idle_closed", m->idle_closed);
    print_number("fillers", m->fillers);
    printf(",\"errors\":{");
    for (size_t i = 0; i < ERROR_KINDS && m->errors[i].kind[0]; ++i)
        printf("%s\"%s\":%llu", i ? "," : "", m->errors[i].kind, (unsigned long long)m->errors[i].count);
    putchar('}');
    print_histogram("ttfb_us", &m->ttfb);
    print_histogram("total_us", &m->total);
    print_histogram("delay_us", &m->delay);
    print_histogram("gap_us", &m->gap);
    printf(",\"aborts\":{");
    for (size_t i = 0; i < m->abort_count; ++i)
        printf("%s\"%016llx\":%llu", i ? "," : "", (unsigned long long)m->aborts[i].id,
               (unsigned long long)m->aborts[i].ns);
    putchar('}');
}

#endif
