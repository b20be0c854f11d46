//! A program of ours that runs as users run it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

/// How long a line, or the end, may be waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running program whose lines are read. Dropping it kills it.
#[derive(Debug)]
pub struct Program {
    child: Child,
    lines: Receiver<String>,
    stderr: Option<thread::JoinHandle<String>>,
}

impl Program {
    /// Starts a program.
    ///
    /// # Panics
    /// If it cannot be started.
    #[allow(clippy::disallowed_methods, reason = "the program is what is tested")]
    pub fn start(path: &str, args: &[&str]) -> Self {
        let mut child = Command::new(path)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program can be started");
        let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut stderr = child.stderr.take().expect("it is piped");
        // More than any test lets a program print.
        let (send, lines) = sync_channel(10_000);
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).ok();
            text
        });
        Self {
            child,
            lines,
            stderr: Some(stderr),
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that begins so, and forgets those before it.
    ///
    /// # Panics
    /// If there is none within a minute.
    pub fn line(&self, begins: &str) -> String {
        let mut before = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.starts_with(begins) => return line,
                Ok(line) => before.push(line),
                Err(error) => panic!("no line {begins:?} ({error}); lines: {before:#?}"),
            }
        }
    }

    /// Waits until it ends; answers its exit code, what is left of its standard output, and its
    /// standard error.
    ///
    /// # Panics
    /// If it does not end within a minute, or is ended by a signal.
    pub fn end(mut self) -> (i32, String, String) {
        let mut out = String::new();
        // The channel closes when the program has closed its output.
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            out += &line;
            out.push('\n');
        }
        let status = self.child.try_wait().expect("it is ours");
        let status = status.or_else(|| {
            // It has no output any more, so it is about to end.
            self.child.wait().ok()
        });
        let code = status.and_then(|status| status.code());
        let stderr = self.stderr.take().map(thread::JoinHandle::join);
        let stderr = stderr.and_then(Result::ok).unwrap_or_default();
        (
            code.unwrap_or_else(|| panic!("it ended by a signal: {stderr}")),
            out,
            stderr,
        )
    }

    /// Ends it by SIGKILL, without a chance to do anything.
    pub fn kill(mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // That it has ended already is fine.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
