/* Loaded into a process before its libraries: the flush whose number is in FAIL_FLUSH, or the write to a place of a file
 * whose number is in FAIL_WRITE, fails as on a broken disk, or with FAIL_FULL as on a full one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_int flushes, writes;

/* Whether this call is the one that fails; says so. */
static int fails(const char *variable, atomic_int *calls) {
    const char *failing = getenv(variable);
    if (!failing || atomic_fetch_add(calls, 1) + 1 != atoi(failing)) return 0;
    static const char said[] = "the disk failed\n";
    if (write(STDERR_FILENO, said, sizeof said - 1) < 0) abort();
    errno = getenv("FAIL_FULL") ? ENOSPC : EIO;
    return 1;
}

static int flush(const char *name, int file) {
    if (fails("FAIL_FLUSH", &flushes)) return -1;
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(file);
}

static ssize_t put(const char *name, int file, const void *bytes, size_t length, off_t at) {
    if (fails("FAIL_WRITE", &writes)) return -1;
    ssize_t (*real)(int, const void *, size_t, off_t) = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, name);
    return real(file, bytes, length, at);
}

int fsync(int file) { return flush("fsync", file); }
int fdatasync(int file) { return flush("fdatasync", file); }
ssize_t pwrite(int file, const void *bytes, size_t length, off_t at) { return put("pwrite", file, bytes, length, at); }
ssize_t pwrite64(int file, const void *bytes, size_t length, off_t at) { return put("pwrite64", file, bytes, length, at); }
