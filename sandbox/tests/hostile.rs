//! Programs that mean harm, or lose their way: each is contained and reported, and leaves nothing behind.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tunefleet_sandbox::{Ended, Error, Isolation, Limits, Outcome, Program, Sandbox};

const PYTHON: &str = "/usr/bin/python3";

/// A sandbox, or `None` where this machine cannot isolate; in CI that is a failure.
fn sandbox(isolation: Isolation, limits: Limits) -> Option<Sandbox> {
    let sandbox = Sandbox::with_helper(Path::new(env!("CARGO_BIN_EXE_sandbox")), isolation, limits);
    let why = match sandbox.run(&python("pass")) {
        Ok(_) => return Some(sandbox),
        Err(error) => error.to_string(),
    };
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("skipped: {why}");
    None
}

fn python(code: &str) -> Program {
    let argv = [PYTHON, "-I", "-S", "-c", code].map(str::to_owned).to_vec();
    Program { argv, readable: Vec::new(), stdin: String::new() }
}

fn short() -> Limits {
    Limits { wall_seconds: 1.0, ..Limits::default() }
}

fn run(code: &str, limits: Limits) -> Option<Outcome> {
    Some(sandbox(Isolation::Full, limits)?.run(&python(code)).unwrap())
}

/// Processes of this machine whose command line has `mark` in it.
fn processes_with(mark: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned()).filter(|line| line.contains(mark)).collect()
}

#[test]
fn a_fork_bomb_meets_its_limit_and_leaves_nobody() {
    let mark = format!("bomb-{}", std::process::id());
    let code = format!("import os\n# {mark}\nwhile True:\n  try: os.fork()\n  except OSError: pass");
    let Some(outcome) = run(&code, short()) else { return };
    assert_eq!(outcome.ended, Ended::TimedOut);
    assert_eq!(processes_with(&mark), Vec::<String>::new());
}

#[test]
fn a_child_that_outlives_its_parent_ends_with_it() {
    let mark = format!("orphan-{}", std::process::id());
    let code = format!(
        "import os, time\n# {mark}\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)"
    );
    let began = Instant::now();
    let Some(outcome) = run(&code, Limits::default()) else { return };
    assert_eq!(outcome.ended, Ended::Exited(0));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(processes_with(&mark), Vec::<String>::new());
}

#[test]
fn what_takes_too_much_is_ended() {
    let megabytes = |count: u64| Limits { memory_bytes: count << 20, ..Limits::default() };
    let family = "import os\nfor n in range(6):\n  if os.fork() == 0: break\nx = bytearray(60 << 20)\nimport time\ntime.sleep(60)";
    let blocking = "import sys\nwhile True:\n  if not sys.stdin.read(1): pass";
    for (code, limits, expected) in [
        ("import time; time.sleep(1000)", short(), Ended::TimedOut),
        ("while True: pass", short(), Ended::TimedOut),
        (blocking, short(), Ended::TimedOut),
        ("import os, time\nos.closerange(0, 1000)\ntime.sleep(1000)", short(), Ended::TimedOut),
        (
            "import signal, time\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\ntime.sleep(1000)",
            short(),
            Ended::TimedOut,
        ),
        ("while True: print('x' * 1000)", short(), Ended::TooMuchOutput),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", short(), Ended::TooMuchOutput),
        ("x = bytearray(100 << 30)", Limits::default(), Ended::Exited(1)),
        (family, megabytes(200), Ended::TooMuchMemory),
    ] {
        let Some(outcome) = run(code, limits) else { return };
        assert_eq!(outcome.ended, expected, "{code}: {}", outcome.stderr);
        assert!(outcome.wall_seconds < 2.0, "{code}: {}", outcome.wall_seconds);
        assert!(outcome.stdout.len() <= 64 << 10 && outcome.stderr.len() <= 64 << 10);
    }
}

#[test]
fn nothing_outside_is_read_written_or_reached() {
    let host = tempfile::tempdir().unwrap();
    let secret = host.path().join("secret");
    fs::write(&secret, "a secret").unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let attempts = [
        format!("open({secret:?}).read()"),
        format!("open({secret:?}, 'w')"),
        format!("__import__('os').listdir({:?})", host.path()),
        "open('/etc/passwd').read()".to_owned(),
        "open('/proc/1/environ').read()".to_owned(),
        "open('/usr/x', 'w')".to_owned(),
        "open('/dev/x', 'w')".to_owned(),
        "open('/x', 'w')".to_owned(),
        format!("__import__('socket').create_connection(('127.0.0.1', {port}))"),
        "__import__('socket').socket(__import__('socket').AF_UNIX)".to_owned(),
        "__import__('os').environ['CARGO_MANIFEST_DIR']".to_owned(),
        "__import__('os').chroot('/tmp')".to_owned(),
        "__import__('os').setuid(1)".to_owned(),
        "open('/tmp/big', 'wb').write(bytes(64 << 20))".to_owned(),
        "[open(f'/tmp/{n}', 'wb').write(bytes(1 << 20)) for n in range(64)]".to_owned(),
    ];
    let mut code = "import sys\nsys.stdout.write('begun\\n')\n".to_owned();
    for attempt in &attempts {
        code += &format!("try:\n  {attempt}\n  print({attempt:?})\nexcept (OSError, KeyError): pass\n");
    }
    // From C, past Python's own wrappers: mount, unshare, ptrace, a user namespace by clone, a raw socket, a keyring.
    code += "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n\
             for call in [(165, 0, b'/tmp', b'tmpfs', 0, 0), (272, 0x10000000), (101, 16, 1, 0, 0), (56, 0x10000011, 0), \
             (41, 2, 1, 0), (250, 0, 0), (317, 1, 0, 0), (321, 0, 0, 0), (435, 0, 0)]:\n\
             \u{20} if libc.syscall(*call) != -1: print('call', call)\n";
    let Some(outcome) = run(&code, Limits::default()) else { return };
    assert_eq!(
        (outcome.stdout.as_str(), &outcome.ended),
        ("begun\n", &Ended::Exited(0)),
        "{}",
        outcome.stderr
    );
    assert_eq!(fs::read_to_string(&secret).unwrap(), "a secret");
    assert!(!Path::new("/usr/x").exists());
}

#[test]
fn who_kills_its_parent_or_everybody_kills_only_itself() {
    for code in [
        "import os, signal; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.killpg(0, 9)",
    ] {
        let Some(outcome) = run(code, short()) else { return };
        assert!(matches!(outcome.ended, Ended::Exited(_) | Ended::Signalled(9)), "{code}: {outcome:?}");
    }
}

#[test]
fn what_programs_need_works() {
    let code = "import subprocess, sys, threading, tempfile, multiprocessing.pool, re, json, decimal\n\
                threading.Thread(target=lambda: print('thread', flush=True)).start()\n\
                print(subprocess.run([sys.executable, '-I', '-S', '-c', 'print(6 * 7)'], capture_output=True, text=True).stdout)\n\
                with tempfile.NamedTemporaryFile() as file: file.write(b'x')\n\
                print(sys.stdin.read())";
    let Some(sandbox) = sandbox(Isolation::Full, Limits::default()) else { return };
    let outcome = sandbox.run(&Program { stdin: "given".repeat(50_000), ..python(code) }).unwrap();
    assert_eq!(outcome.ended, Ended::TooMuchOutput, "{outcome:?}");
    let outcome = sandbox.run(&Program { stdin: "given".to_owned(), ..python(code) }).unwrap();
    assert_eq!(
        (outcome.stdout.as_str(), &outcome.ended),
        ("thread\n42\n\ngiven\n", &Ended::Exited(0)),
        "{}",
        outcome.stderr
    );
}

#[test]
fn without_namespaces_limits_and_the_filter_still_hold() {
    let mark = format!("group-{}", std::process::id());
    let orphan = format!(
        "import os, time\n# {mark}\nif os.fork() == 0:\n  try: os.setsid()\n  except OSError: pass\n  time.sleep(60)"
    );
    let Some(sandbox) = sandbox(Isolation::LimitsOnly, short()) else { return };
    for (code, expected) in [
        ("import time; time.sleep(1000)", Ended::TimedOut),
        ("x = bytearray(100 << 30)", Ended::Exited(1)),
        ("import socket; socket.socket()", Ended::Exited(1)),
        (&orphan, Ended::Exited(0)),
    ] {
        assert_eq!(sandbox.run(&python(code)).unwrap().ended, expected, "{code}");
    }
    assert_eq!(processes_with(&mark), Vec::<String>::new());
}

#[test]
fn what_cannot_be_run_is_told() {
    let Some(sandbox) = sandbox(Isolation::Full, Limits::default()) else { return };
    let program = Program {
        argv: vec!["/usr/bin/no-such-python".to_owned()],
        readable: Vec::new(),
        stdin: String::new(),
    };
    let error = sandbox.run(&program).unwrap_err();
    assert!(
        matches!(error, Error::Refused(_))
            && error.to_string().contains("/usr/bin/no-such-python: No such file"),
        "{error}"
    );
    let none = Sandbox::with_helper(Path::new("/no/helper"), Isolation::Full, Limits::default());
    assert!(matches!(none.run(&program).unwrap_err(), Error::Helper { .. }));
    let other = Sandbox::with_helper(Path::new("/bin/true"), Isolation::Full, Limits::default());
    assert!(matches!(other.run(&program).unwrap_err(), Error::NoAnswer { .. }));
}
