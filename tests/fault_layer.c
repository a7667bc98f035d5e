/* Lets the system calls that change files below one folder fail, one at a time. Linux on x86-64.

   A seccomp filter stops each such call, whoever makes it: Python, C++ or Rust, through libc or past it
   (safetensors renames its file past it, so that preloading another `rename` would not see that). `stopped`
   then counts the call, and makes it, fails it, cuts it short, or kills the process. The filter cannot be
   taken away again, so it belongs into a process of its own; programs that this one starts keep it without
   its handler, and may write to their standard streams only. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef __x86_64__
#error "written for x86-64"
#endif

/* As in fault_layer.py. */
enum { NOTHING, FAIL, SHORT, HALF, KILL_BEFORE, KILL_AFTER };
enum { SHORTEST = 4096, PIECES = 64 };

/* Where the arguments of a call say what it changes; -1 where it has no such argument. */
static const struct call {
    int number;
    const char *name;
    int fd, folder, path; /* a descriptor; or a path, relative to a folder's descriptor */
    int flags;            /* of an `open`: one that only reads is none of ours */
    int size;             /* bytes to write */
} calls[] = {
    {SYS_open, "open", -1, -1, 0, 1, -1},
    {SYS_openat, "open", -1, 0, 1, 2, -1},
    {SYS_creat, "open", -1, -1, 0, -1, -1},
    {SYS_write, "write", 0, -1, -1, -1, 2},
    {SYS_pwrite64, "write", 0, -1, -1, -1, 2},
    {SYS_sendfile, "sendfile", 0, -1, -1, -1, 3},
    {SYS_copy_file_range, "sendfile", 2, -1, -1, -1, 4},
    {SYS_writev, "writev", 0, -1, -1, -1, -1},
    {SYS_pwritev, "writev", 0, -1, -1, -1, -1},
    {SYS_pwritev2, "writev", 0, -1, -1, -1, -1},
    {SYS_truncate, "truncate", -1, -1, 0, -1, -1},
    {SYS_ftruncate, "truncate", 0, -1, -1, -1, -1},
    {SYS_fallocate, "truncate", 0, -1, -1, -1, -1},
    {SYS_fsync, "fsync", 0, -1, -1, -1, -1},
    {SYS_fdatasync, "fsync", 0, -1, -1, -1, -1},
    {SYS_rename, "rename", -1, -1, 1, -1, -1},
    {SYS_renameat, "rename", -1, 2, 3, -1, -1},
    {SYS_renameat2, "rename", -1, 2, 3, -1, -1},
    {SYS_link, "link", -1, -1, 1, -1, -1},
    {SYS_linkat, "link", -1, 2, 3, -1, -1},
    {SYS_symlink, "link", -1, -1, 1, -1, -1},
    {SYS_symlinkat, "link", -1, 1, 2, -1, -1},
    {SYS_mkdir, "mkdir", -1, -1, 0, -1, -1},
    {SYS_mkdirat, "mkdir", -1, 0, 1, -1, -1},
    {SYS_unlink, "unlink", -1, -1, 0, -1, -1},
    {SYS_unlinkat, "unlink", -1, 0, 1, -1, -1},
    {SYS_rmdir, "unlink", -1, -1, 0, -1, -1},
};
enum { KNOWN = sizeof calls / sizeof *calls };

static char watched[PATH_MAX];
static int log_descriptor, action, error_number;
static long first, last, count;

/* A system call that the filter lets pass: it knows the address behind the instruction. */
long fault_layer_call(long number, ...);
extern const char fault_layer_passed[];
__asm__(".text\n"
        ".globl fault_layer_call\n"
        "fault_layer_call:\n"
        "  mov %rdi, %rax; mov %rsi, %rdi; mov %rdx, %rsi; mov %rcx, %rdx\n"
        "  mov %r8, %r10; mov %r9, %r8; mov 8(%rsp), %r9\n"
        "  syscall\n"
        ".globl fault_layer_passed\n"
        "fault_layer_passed:\n"
        "  ret\n");

static long pass(const struct call *call, const long *a) {
    return fault_layer_call(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* The same call with fewer bytes. */
static long pass_short(const struct call *call, const long *arguments) {
    long a[6];
    struct iovec pieces[PIECES];
    memcpy(a, arguments, sizeof a);
    if (call->size >= 0) {
        a[call->size] = a[call->size] / 2 < SHORTEST ? a[call->size] / 2 : SHORTEST;
    } else {
        a[2] = a[2] < PIECES ? a[2] : PIECES;
        memcpy(pieces, (void *)a[1], a[2] * sizeof *pieces);
        pieces[a[2] - 1].iov_len /= 2;
        a[1] = (long)pieces;
    }
    return pass(call, a);
}

/* What a call changes, as an absolute path. */
static void path_of(const struct call *call, const long *a, char *path) {
    char link[64];
    const char *name = call->path >= 0 ? (const char *)a[call->path] : "";
    int descriptor = call->fd >= 0 ? a[call->fd] : call->folder >= 0 ? (int)a[call->folder] : AT_FDCWD;
    ssize_t length = 0;
    if (*name != '/') {
        snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", descriptor);
        length = readlink(link, path, PATH_MAX - 1);
        length = length < 0 ? 0 : length;
        if (*name)
            path[length++] = '/';
    }
    snprintf(path + length, PATH_MAX - length, "%s", name);
}

static int is_watched(const char *path) {
    size_t length = strlen(watched);
    return length && !strncmp(path, watched, length) && (path[length] == '/' || !path[length]);
}

static void note(long number, const struct call *call, const char *path) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, call->name, path);
    if (log_descriptor >= 0)
        fault_layer_call(SYS_write, log_descriptor, line, length);
}

static long decide(const struct call *call, const long *a) {
    char path[PATH_MAX];
    path_of(call, a, path);
    if (!is_watched(path))
        return pass(call, a);
    long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST), result;
    note(number, call, path);
    int is_write = strstr("writev sendfile", call->name) != NULL;
    int fails = action == FAIL || action == HALF, deletes = !strcmp(call->name, "unlink");
    if (number < first || number > last || (fails && deletes && error_number == ENOSPC))
        return pass(call, a); /* a full disk still deletes */
    if (action == KILL_BEFORE)
        kill(getpid(), SIGKILL);
    if (action == FAIL || (action == HALF && !is_write))
        return -error_number;
    result = is_write && (action == SHORT || action == HALF) ? pass_short(call, a) : pass(call, a);
    if (action == KILL_AFTER)
        kill(getpid(), SIGKILL);
    return action == HALF ? -error_number : result;
}

static void stopped(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a[] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX],
                registers[REG_R10], registers[REG_R8],  registers[REG_R9]};
    int before = errno;
    for (int i = 0; i < KNOWN; i++)
        if (calls[i].number == info->si_syscall)
            registers[REG_RAX] = decide(&calls[i], a);
    errno = before;
    (void)signal;
}

static int filter_calls(void) {
    struct sock_filter code[16 + 5 * KNOWN];
    unsigned short n = 0;
    unsigned long passed = (unsigned long)fault_layer_passed;
#define LOAD(field) (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define SKIP(how, value, yes, no) (struct sock_filter) BPF_JUMP(BPF_JMP | (how) | BPF_K, value, yes, no)
#define RETURN(what) (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, what)
    code[n++] = LOAD(instruction_pointer);
    code[n++] = SKIP(BPF_JEQ, (unsigned)passed, 0, 3);
    code[n++] = (struct sock_filter)BPF_STMT(
        BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4);
    code[n++] = SKIP(BPF_JEQ, (unsigned)(passed >> 32), 0, 1);
    code[n++] = RETURN(SECCOMP_RET_ALLOW);
    code[n++] = LOAD(nr);
    for (int i = 0; i < KNOWN; i++) {
        const struct call *call = &calls[i];
        int argument = call->fd >= 0 ? call->fd : call->flags;
        code[n++] = SKIP(BPF_JEQ, call->number, 0, argument >= 0 ? 4 : 1);
        if (argument >= 0) {
            code[n++] = LOAD(args[argument]);
            code[n++] = call->fd >= 0 ? SKIP(BPF_JGT, 2, 0, 1)
                                      : SKIP(BPF_JSET, O_WRONLY | O_RDWR | O_CREAT | O_TRUNC, 0, 1);
        }
        code[n++] = RETURN(SECCOMP_RET_TRAP);
        if (argument >= 0)
            code[n++] = RETURN(SECCOMP_RET_ALLOW);
    }
    code[n++] = RETURN(SECCOMP_RET_ALLOW);
    struct sock_fprog program = {n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return errno;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? errno : 0;
}

/* From now on the calls `begin` to `end` (counted from 1) of those that change something below `folder`
   suffer `what`. Returns 0, or why the kernel takes no filter. */
int fault_layer_arm(const char *folder, int log, int what, int error, long begin, long end) {
    static int is_filtered;
    struct sigaction handler = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    snprintf(watched, sizeof watched, "%s", folder);
    log_descriptor = log, action = what, error_number = error, first = begin, last = end, count = 0;
    if (is_filtered++)
        return 0;
    return sigaction(SIGSYS, &handler, NULL) ? errno : filter_calls();
}
