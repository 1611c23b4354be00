#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void stop(int number) { _exit(0 * number); }
static void reap(int number) { while (waitpid(-1, NULL, 0 * number + WNOHANG) > 0); }

int main(void) {
    signal(SIGINT, stop);
    signal(SIGTERM, stop);
    signal(SIGCHLD, reap);
    for (;;) pause();
}
