"""A stand-in for Python whose programs come from a fork server (see fork_server.py, which writes a first line before).

It passes signals on and ends as the program does. Where Python has to begin anew, for the sake of options or of what it
and libraries read once from the environment, it does.
"""

import json
import os
import signal
import socket
import sys

READ_ONCE = ('HF_', 'HOME', 'LANG', 'LC_', 'PYTHON', 'XDG_')
HEEDED = ('PYTHONPATH', 'PYTHONUNBUFFERED')


def main():
    with open(os.path.join(os.path.dirname(sys.argv[0]), 'settings.json'), 'rb') as f:
        settings = json.load(f)
    argv, env = sys.argv[1:], dict(os.environ)
    changed = {name for name, _ in env.items() ^ settings['env'].items()}.difference(HEEDED)
    option = argv[0] if argv and argv[0].startswith('-') else '-m'
    if not argv or option not in ('-c', '-m', '-u') or any(name.startswith(READ_ONCE) for name in changed):
        os.execv(settings['python'], [settings['python'], *argv])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(settings['socket'])
    request = {'argv': argv, 'env': env, 'cwd': os.getcwd(), 'executable': sys.argv[0]}
    socket.send_fds(connection, [json.dumps(request).encode() + b'\n'], [0, 1, 2])
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
