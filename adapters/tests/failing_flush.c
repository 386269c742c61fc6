/* Loaded into a process before its libraries: the flush whose number is in FAIL_FLUSH fails as on a broken disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_int flushes;

static int flush(const char *name, int file) {
    const char *failing = getenv("FAIL_FLUSH");
    if (failing && atomic_fetch_add(&flushes, 1) + 1 == atoi(failing)) {
        static const char said[] = "a flush failed\n";
        if (write(STDERR_FILENO, said, sizeof said - 1) < 0) abort();
        errno = EIO;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(file);
}

int fsync(int file) { return flush("fsync", file); }
int fdatasync(int file) { return flush("fdatasync", file); }
