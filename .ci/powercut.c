/* What a power cut would leave: preloaded into hookd, this copies each file below $POWERCUT_FROM
 * to the same place below $POWERCUT_TO once fsync(2) or fdatasync(2) has said that it is on disk.
 * A file that is never synced is never copied. Rollback journals, gone before hookd listens, are
 * left out. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void copy(int fd)
{
    const char *from = getenv("POWERCUT_FROM"), *to = getenv("POWERCUT_TO");
    char link[64], path[PATH_MAX], target[2 * PATH_MAX], part[2 * PATH_MAX + 8], block[65536];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    struct stat info;
    if (!from || !to || size < 0 || fstat(fd, &info) || !S_ISREG(info.st_mode))
        return;
    path[size] = 0;
    if (strncmp(path, from, strlen(from)) || strstr(path, "-journal"))
        return;
    snprintf(target, sizeof target, "%s%s", to, path + strlen(from));
    for (char *slash = target + strlen(to) + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(target, 0700);
        *slash = '/';
    }
    snprintf(part, sizeof part, "%s.part", target);
    int in = open(path, O_RDONLY), out = open(part, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    while ((size = read(in, block, sizeof block)) > 0)
        if (write(out, block, size) != size)
            abort();
    close(in);
    close(out);
    rename(part, target);
}

static int synced(const char *name, int fd)
{
    int (*real)(int) = dlsym(RTLD_NEXT, name);
    int result = real(fd);
    if (result == 0)
        copy(fd);
    return result;
}

int fdatasync(int fd) { return synced("fdatasync", fd); }
int fsync(int fd) { return synced("fsync", fd); }
