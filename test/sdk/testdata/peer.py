"""Runs the Python SDK against an agent on port 49983.

Usage: python peer.py DIRECTORY. Prints one line of JSON for each check. PATIENCE
is by how much longer one may take than on an ordinary machine.
"""

import asyncio
import io
import json
import os
import signal
import sys
import time
import traceback

import e2b
from e2b import AsyncSandbox, Sandbox

FOLDER = sys.argv[1]
PATIENCE = int(os.environ.get("PATIENCE", "1"))
box = Sandbox.create(debug=True)
box.files.make_dir(FOLDER)
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def equal(got, want):
    if got != want:
        raise AssertionError(f"got {got!r:.300}, want {want!r:.300}")


def until(what, condition):
    for _ in range(1200 * PATIENCE):
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError("not " + what)


def fails(kind, call):
    try:
        call()
    except kind as error:
        return error
    except Exception as error:
        raise AssertionError(f"failed with {type(error).__name__}: {error}, want {kind.__name__}")
    raise AssertionError("did not fail")


@check
def the_sandbox_runs():
    equal(box.is_running(), True)


@check
def commands_output_errors_and_exit_code():
    done = box.commands.run("echo out; echo err >&2")
    equal((done.stdout, done.stderr, done.exit_code), ("out\n", "err\n", 0))
    failed = fails(e2b.CommandExitException, lambda: box.commands.run("echo half; exit 3"))
    equal((failed.exit_code, failed.stdout, failed.error), (3, "half\n", "exit status 3"))


@check
def commands_environment_and_directory():
    done = box.commands.run("echo $X; pwd", envs={"X": "x y"}, cwd=FOLDER)
    equal(done.stdout, f"x y\n{FOLDER}\n")
    fails(e2b.InvalidArgumentException, lambda: box.commands.run("true", cwd="/no/such/place"))
    fails(e2b.AuthenticationException, lambda: box.commands.run("true", user="nobody-knows"))


@check
def commands_in_the_background():
    command = box.commands.run('while read line; do echo "got $line"; done; exit 5', background=True, stdin=True)
    assert any(p.pid == command.pid for p in box.commands.list())
    box.commands.send_stdin(command.pid, "one\n")
    if hasattr(box.commands, "stream_input"):
        box.commands.stream_input(command.pid, iter(["tw", "o\n"]))
    else:
        box.commands.send_stdin(command.pid, "two\n")
    box.commands.close_stdin(command.pid)
    end = fails(e2b.CommandExitException, command.wait)
    equal((end.exit_code, end.stdout), (5, "got one\ngot two\n"))
    again = box.commands.connect(command.pid)
    equal(fails(e2b.CommandExitException, again.wait).exit_code, 5)
    equal(box.commands.kill(command.pid), False)
    endless = box.commands.run("sleep 300", background=True)
    equal(endless.kill(), True)
    equal(fails(e2b.CommandExitException, endless.wait).exit_code, -1)


@check
def commands_timeout():
    fails(e2b.TimeoutException, lambda: box.commands.run("sleep 30", timeout=0.5))
    equal(box.commands.run("sleep 1; echo done", timeout=0).stdout, "done\n")


@check
def commands_much_output():
    lines = box.commands.run("seq 1 300000").stdout.splitlines()
    equal((len(lines), lines[0], lines[-1]), (300000, "1", "300000"))


@check
def commands_a_hundred_in_a_row():
    for i in range(100):
        equal(box.commands.run(f"echo {i}").stdout, f"{i}\n")


@check
def pty_type_resize_and_leave():
    terminal = box.pty.create(e2b.PtySize(rows=24, cols=80), cwd=FOLDER, envs={"PS1": "$ "})
    box.pty.send_stdin(terminal.pid, b"stty size; pwd\n")
    box.pty.resize(terminal.pid, e2b.PtySize(rows=50, cols=132))
    if hasattr(box.pty, "stream_input"):
        box.pty.stream_input(terminal.pid, [b"stty ", b"size\n"])
    else:
        box.pty.send_stdin(terminal.pid, b"stty size\n")
    box.pty.send_stdin(terminal.pid, b"exit 7\n")
    screen = bytearray()
    end = fails(e2b.CommandExitException, lambda: terminal.wait(on_pty=screen.extend))
    equal(end.exit_code, 7)
    assert FOLDER.encode() in screen and b"50 132" in screen, bytes(screen)
    equal(box.pty.kill(terminal.pid), False)


@check
def pty_connect_and_kill():
    terminal = box.pty.create(e2b.PtySize(rows=24, cols=80))
    terminal.disconnect()
    again = box.pty.connect(terminal.pid)
    box.pty.send_stdin(terminal.pid, b"echo $((40+2))\n")
    screen = b""  # what a terminal shows comes in pieces of any size
    for _, _, data in again:
        screen += data or b""
        if b"42" in screen:
            break
    equal(box.pty.kill(terminal.pid), True)


@check
def files_write_and_read_in_all_forms():
    path = f"{FOLDER}/deep/er/a b ü (1).txt"
    info = box.files.write(path, "hello")
    equal((info.name, info.path), ("a b ü (1).txt", path))
    equal(box.files.read(path), "hello")
    equal(bytes(box.files.read(path, format="bytes")), b"hello")
    equal(b"".join(box.files.read(path, format="stream")), b"hello")
    box.files.write(path, io.BytesIO(b"again"))
    equal(box.files.read(path), "again")
    box.files.write(f"{FOLDER}/empty", "")
    equal(box.files.read(f"{FOLDER}/empty"), "")


@check
def files_compressed_and_as_octets():
    text = "compress me " * 20000
    box.files.write(f"{FOLDER}/packed", text, gzip=True)
    equal(box.files.read(f"{FOLDER}/packed", gzip=True) == text, True)
    box.files.write(f"{FOLDER}/octets", text, use_octet_stream=True)
    equal(box.files.read(f"{FOLDER}/octets") == text, True)


@check
def files_several_at_once_and_a_large_one():
    large = bytes((i * 31) & 255 for i in range(1 << 16)) * 128
    written = box.files.write_files([
        {"path": f"{FOLDER}/one", "data": "1"},
        {"path": f"{FOLDER}/sub/two", "data": b"22"},
        {"path": f"{FOLDER}/large", "data": large},
    ])
    equal([w.path for w in written], [f"{FOLDER}/one", f"{FOLDER}/sub/two", f"{FOLDER}/large"])
    equal(bytes(box.files.read(f"{FOLDER}/large", format="bytes")) == large, True)


@check
def files_metadata():
    metadata = {"author": "me", "content-kind": "note"}
    equal(box.files.write(f"{FOLDER}/m", "x", metadata=metadata).metadata, metadata)
    equal(box.files.get_info(f"{FOLDER}/m").metadata, metadata)
    box.files.write(f"{FOLDER}/m", "y", metadata={"other": "z"})
    equal(box.files.get_info(f"{FOLDER}/m").metadata, {"other": "z"})
    box.files.write(f"{FOLDER}/m", "y")
    assert not box.files.get_info(f"{FOLDER}/m").metadata


@check
def files_directories_and_information():
    equal(box.files.make_dir(f"{FOLDER}/made/deep"), True)
    equal(box.files.make_dir(f"{FOLDER}/made/deep"), False)
    box.files.write(f"{FOLDER}/made/f", "four")
    box.commands.run(f"ln -s f {FOLDER}/made/link && chmod 640 {FOLDER}/made/f")
    info = box.files.get_info(f"{FOLDER}/made/f")
    equal((info.size, info.mode, info.permissions), (4, 0o640, "-rw-r-----"))
    equal(box.files.get_info(f"{FOLDER}/made/link").symlink_target, f"{FOLDER}/made/f")
    equal([e.name for e in box.files.list(f"{FOLDER}/made")], ["deep", "f", "link"])
    assert any(e.path == f"{FOLDER}/made/f" for e in box.files.list(FOLDER, depth=2))
    equal(box.files.rename(f"{FOLDER}/made/f", f"{FOLDER}/made/new/g").path, f"{FOLDER}/made/new/g")
    equal((box.files.exists(f"{FOLDER}/made/f"), box.files.exists(f"{FOLDER}/made/new/g")), (False, True))
    box.files.remove(f"{FOLDER}/made")
    equal(box.files.exists(f"{FOLDER}/made"), False)


@check
def files_what_fails():
    fails(e2b.NotFoundException, lambda: box.files.read(f"{FOLDER}/missing"))
    fails(e2b.InvalidArgumentException, lambda: box.files.read(FOLDER))
    fails(e2b.NotFoundException, lambda: box.files.list(f"{FOLDER}/missing"))
    fails(e2b.NotFoundException, lambda: box.files.rename(f"{FOLDER}/missing", f"{FOLDER}/x"))
    fails(e2b.AuthenticationException, lambda: box.files.read(f"{FOLDER}/one", user="nobody-knows"))
    fails(e2b.NotFoundException, lambda: box.files.watch_dir(f"{FOLDER}/missing"))


@check
def watch_by_asking():
    box.files.make_dir(f"{FOLDER}/watched/sub")
    handle = box.files.watch_dir(f"{FOLDER}/watched", recursive=True, include_entry=True)
    box.files.write(f"{FOLDER}/watched/new", "x")
    box.commands.run(f"cd {FOLDER}/watched && mkdir fast && echo x > fast/file && mv new sub/moved && rm sub/moved")
    want = sorted([
        "create new", "write new", "create fast", "create fast/file", "write fast/file",
        "rename new", "create sub/moved", "remove sub/moved",
    ])
    events = []

    def told():
        events.extend(handle.get_new_events())
        return len(events) >= len(want)

    until("told of all", told)
    equal(sorted(f"{e.type.value} {e.name}" for e in events), want)
    entries = [e.entry for e in events if e.name == "fast/file" and e.entry]
    equal(entries[0].path, f"{FOLDER}/watched/fast/file")
    handle.stop()
    fails(e2b.SandboxException, handle.get_new_events)


@check
def all_of_it_asynchronously():
    async def run():
        sandbox = await AsyncSandbox.create(debug=True)
        done = await asyncio.gather(*[sandbox.commands.run(f"echo {i}") for i in range(20)])
        equal([d.stdout for d in done], [f"{i}\n" for i in range(20)])
        await sandbox.files.make_dir(f"{FOLDER}/async")
        seen = []
        handle = await sandbox.files.watch_dir(f"{FOLDER}/async", on_event=lambda e: seen.append(f"{e.type.value} {e.name}"))
        await sandbox.files.write(f"{FOLDER}/async/f", "x")
        screen = bytearray()
        terminal = await sandbox.pty.create(e2b.PtySize(rows=24, cols=80), on_data=screen.extend)
        await sandbox.pty.send_stdin(terminal.pid, b"echo $((40+2)); exit\n")
        await terminal.wait()
        assert b"42" in screen, bytes(screen)
        for _ in range(1200 * PATIENCE):
            if len(seen) >= 2:
                break
            await asyncio.sleep(0.025)
        equal(seen, ["create f", "write f"])
        await handle.stop()

    asyncio.run(run())


def late(*_):
    raise AssertionError(f"took longer than {60 * PATIENCE} s")


signal.signal(signal.SIGALRM, late)
for function in CHECKS:
    began, error = time.time(), None
    signal.alarm(60 * PATIENCE)
    try:
        function()
    except BaseException as e:
        error = f"{type(e).__name__}: {e}\n{traceback.format_exc()}"
    signal.alarm(0)
    line = {"name": function.__name__.replace("_", " "), "error": error, "ms": round(1000 * (time.time() - began))}
    print(json.dumps(line), flush=True)
