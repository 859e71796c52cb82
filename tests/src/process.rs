//! Starting programs inside a sandbox.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::PATH;
use crate::netns::Namespace;
use crate::wait::wait_for;

/// What no command of a scenario takes as long as.
const PATIENCE: Duration = Duration::from_secs(30);

/// A program that is about to be started in a namespace and a cgroup.
#[derive(Debug)]
pub struct Program<'s> {
    namespace: &'s Namespace,
    command: Command,
    shown: String,
}

impl<'s> Program<'s> {
    /// The shell joins the cgroup and then becomes the program, so that not even its first instruction runs outside.
    /// The environment is bare: a proxy variable of the caller's must not decide where a client connects to.
    pub(crate) fn new(namespace: &'s Namespace, cgroup: &Path, program: &Path) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(cgroup.join("cgroup.procs")).arg(program);
        command.env_clear().env("PATH", PATH).env("LANG", "C.UTF-8").stdin(Stdio::null());
        let shown = program.display().to_string();
        Self { namespace, command, shown }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(self, arg: &str) -> Self {
        self.args([arg])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        for arg in args {
            self.shown = format!("{} {}", self.shown, arg.as_ref());
            self.command.arg(arg.as_ref());
        }
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// When it cannot be started or does not end.
    #[track_caller]
    pub fn run(self) -> Finished {
        self.begin().finish()
    }

    /// Starts it, to be waited for later.
    #[track_caller]
    pub fn begin(mut self) -> Running {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { child: self.spawn(), shown: self.shown }
    }

    /// Starts it, to be asked line by line.
    #[track_caller]
    pub fn converse(mut self) -> Conversation {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = self.spawn();
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Conversation { child, answers, shown: self.shown }
    }

    /// Starts it as a server that writes to a log.
    #[track_caller]
    pub fn serve(mut self, log: PathBuf) -> Process {
        let file = File::options().create(true).append(true).open(&log).expect("open a log");
        self.command.stdout(file.try_clone().expect("duplicate a descriptor")).stderr(file);
        Process { child: self.spawn(), shown: self.shown, log }
    }

    #[track_caller]
    fn spawn(&mut self) -> Child {
        let command = &mut self.command;
        let spawned = self.namespace.enter(|| command.spawn());
        spawned.unwrap_or_else(|error| panic!("start {}: {error}", self.shown))
    }
}

/// A command under way.
#[derive(Debug)]
pub struct Running {
    child: Child,
    shown: String,
}

impl Running {
    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not come; the command is killed then.
    #[track_caller]
    pub fn finish(self) -> Finished {
        let pid = pid(&self.child);
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || sender.send(self.child.wait_with_output()));
        let Ok(output) = receiver.recv_timeout(PATIENCE) else {
            let _ = kill(pid, Signal::SIGKILL);
            panic!("{} did not end within {PATIENCE:?}", self.shown);
        };
        let output = output.expect("wait for a command");
        Finished {
            command: self.shown,
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// What a command left: its exit and its words.
#[derive(Debug)]
pub struct Finished {
    command: String,
    status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Finished {
    /// Whether it exited with success.
    pub fn succeeded(&self) -> bool {
        self.status.success()
    }

    /// Whether it is a `status` that the daemon gave: all is well, or something is told not to be.
    pub fn has_status(&self) -> bool {
        matches!(self.status.code(), Some(0 | 3))
    }

    /// Its standard output without white space around it.
    ///
    /// # Panics
    /// When the command failed.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert!(self.status.success(), "{self:#?}");
        self.stdout.trim()
    }

    /// # Panics
    /// Unless it succeeded and wrote exactly this to its standard output.
    #[track_caller]
    pub fn is(&self, expected: &str) {
        assert_eq!(self.ok(), expected, "{}", self.command);
    }

    /// Its standard error.
    ///
    /// # Panics
    /// When the command did not exit with `code`.
    #[track_caller]
    pub fn failed_with(&self, code: i32) -> &str {
        assert_eq!(self.status.code(), Some(code), "{self:#?}");
        self.stderr.trim()
    }
}

/// A program that answers each line with a line, and is killed when dropped.
#[derive(Debug)]
pub struct Conversation {
    child: Child,
    answers: BufReader<ChildStdout>,
    shown: String,
}

impl Conversation {
    /// Says a line and waits for the answer.
    ///
    /// # Panics
    /// When the program has ended instead.
    #[track_caller]
    pub fn ask(&mut self, line: &str) -> String {
        let said = self.child.stdin.as_mut().map(|stdin| writeln!(stdin, "{line}"));
        let mut answer = String::new();
        let heard = self.answers.read_line(&mut answer);
        assert!(matches!((&said, &heard), (Some(Ok(())), Ok(1..))), "{}: {said:?}, {heard:?}", self.shown);
        answer
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server that runs until its guard is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    shown: String,
    log: PathBuf,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(pid(&self.child), signal).unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.shown));
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has ended by itself, and says how.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        let status = wait_for(PATIENCE, || self.child.try_wait().ok().flatten());
        status.unwrap_or_else(|| panic!("{} did not end within {PATIENCE:?}", self.shown))
    }

    /// Waits until `ready`, which a server is soon.
    ///
    /// # Panics
    /// When it ends instead, or does not get ready.
    #[track_caller]
    pub fn wait_until(&mut self, mut ready: impl FnMut(&Self) -> bool) {
        let outcome = wait_for(PATIENCE, || match self.child.try_wait() {
            Ok(None) => ready(self).then_some(Ok(())),
            ended => Some(Err(format!("{ended:?}"))),
        });
        match outcome {
            Some(Ok(())) => {}
            Some(Err(ended)) => panic!("{} ended instead of getting ready: {ended}", self.shown),
            None => panic!("{} did not get ready within {PATIENCE:?}", self.shown),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let status = self.child.wait().unwrap_or_else(|_| ExitStatus::from_raw(0));
        if thread::panicking() {
            eprintln!("---- {} ({status})\n{}", self.shown, self.log());
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}
