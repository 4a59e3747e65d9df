/* A small libnvidia-ml.so.1 for the tests: what it says of its devices stands in the file that FAKE_NVML names.

   One line a device: key=value pairs. celsius, used, total (MiB), reasons (bits of the throttle reasons), ecc, xid,
   pid and pid_used (one compute process), error (the NVML code that every reading returns), no (a quantity it lacks).
   Without the variable there is no driver. Types and codes are those of nvml.h, API version 11 and later. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER = 9, TIMEOUT = 10 };
#define MIB (1024ULL * 1024)
#define MOST 8

static int ids[MOST] = {0, 1, 2, 3, 4, 5, 6, 7};
static long long seen_xid[MOST];

static int read_line(int index, char *line, int size) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    int at = -1;
    if (!file) return 0;
    while (fgets(line, size, file))
        if (++at == index) break;
    fclose(file);
    return at == index;
}

static int has(const char *line, const char *key, const char **value) {
    size_t length = strlen(key);
    const char *at = line;
    while ((at = strstr(at, key))) {
        if ((at == line || at[-1] == ' ') && at[length] == '=') {
            *value = at + length + 1;
            return 1;
        }
        at += length;
    }
    return 0;
}

static long long number(const char *line, const char *key, long long otherwise) {
    const char *value;
    return has(line, key, &value) ? atoll(value) : otherwise;
}

static int lacks(const char *line, const char *quantity) {
    const char *value;
    return has(line, "no", &value) && strncmp(value, quantity, strlen(quantity)) == 0;
}

static int look(int *device, char *line, const char *quantity) {
    if (!read_line(*device, line, 512)) return NO_DRIVER;
    if (number(line, "error", 0)) return (int)number(line, "error", 0);
    return lacks(line, quantity) ? UNSUPPORTED : OK;
}

#define LOOK(quantity)                          \
    char line[512];                             \
    int code = look(device, line, quantity);    \
    if (code) return code

int nvmlInitWithFlags(unsigned flags) {
    char line[512];
    (void)flags;
    return read_line(0, line, 512) ? OK : NO_DRIVER;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    char line[512];
    for (*count = 0; *count < MOST && read_line((int)*count, line, 512); ++*count) {}
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, int **device) {
    char line[512];
    if (index >= MOST || !read_line((int)index, line, 512)) return INVALID;
    *device = &ids[index];
    return OK;
}

int nvmlDeviceGetName(int *device, char *name, unsigned length) {
    snprintf(name, length, "Fake %c", 'A' + *device);
    return OK;
}

int nvmlDeviceGetUUID(int *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "GPU-%d%d%d%d-fake", *device, *device, *device, *device);
    return OK;
}

int nvmlDeviceGetTemperature(int *device, int sensor, unsigned *celsius) {
    (void)sensor;
    LOOK("celsius");
    *celsius = (unsigned)number(line, "celsius", 40);
    return OK;
}

int nvmlDeviceGetMemoryInfo(int *device, unsigned long long *memory) {
    LOOK("memory");
    memory[0] = number(line, "total", 16000) * MIB;
    memory[2] = number(line, "used", 0) * MIB;
    memory[1] = memory[0] - memory[2];
    return OK;
}

struct process { unsigned pid; unsigned long long used; unsigned gpu, compute; };

int nvmlDeviceGetComputeRunningProcesses_v3(int *device, unsigned *count, struct process *processes) {
    LOOK("processes");
    unsigned there = number(line, "pid", 0) ? 1 : 0, room = *count;
    *count = there;
    if (room < there) return TOO_SMALL;
    if (there) {
        processes[0].pid = (unsigned)number(line, "pid", 0);
        processes[0].used = number(line, "pid_used", 0) * MIB;
    }
    return OK;
}

int nvmlDeviceGetCurrentClocksEventReasons(int *device, unsigned long long *reasons) {
    LOOK("reasons");
    *reasons = number(line, "reasons", 0);
    return OK;
}

int nvmlDeviceGetTotalEccErrors(int *device, int type, int counter, unsigned long long *errors) {
    LOOK("ecc");
    if (type != 1 || counter != 0) return INVALID; /* uncorrected, volatile */
    *errors = number(line, "ecc", 0);
    return OK;
}

/* An event set is its device: each registers one. An XID in the file happens once for each set. */
struct event { int *device; unsigned long long type, data; unsigned gpu, compute; };

int nvmlEventSetCreate(int ***set) {
    *set = malloc(sizeof **set);
    return OK;
}

int nvmlDeviceRegisterEvents(int *device, unsigned long long types, int **set) {
    char line[512];
    if (types != 8 || (read_line(*device, line, 512) && lacks(line, "events"))) return UNSUPPORTED;
    *set = device;
    return OK;
}

int nvmlEventSetWait_v2(int **set, struct event *event, unsigned timeout) {
    int *device = *set;
    (void)timeout;
    LOOK("events");
    long long xid = number(line, "xid", 0);
    if (!xid || xid == seen_xid[*device]) {
        seen_xid[*device] = xid;
        return TIMEOUT;
    }
    seen_xid[*device] = xid;
    event->device = device;
    event->type = 8;
    event->data = xid;
    return OK;
}

const char *nvmlErrorString(int code) {
    static char text[32];
    snprintf(text, sizeof text, "NVML error %d", code);
    return text;
}
