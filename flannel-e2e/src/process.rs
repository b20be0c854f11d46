//! A node in a process of its own.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};

use flannel_core::{MemoryState, NodeId};
use flannel_testkit::netns::Ns;
use serde::{Deserialize, Serialize};

/// What the process is told, as one line of JSON on its standard input.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    /// The file of the namespace where the overlay is to be.
    pub namespace: PathBuf,
    /// The node.
    pub node: NodeId,
    /// The store as it is: config and everybody's leases.
    pub store: MemoryState,
}

/// A running process with an overlay that is ready. Dropping it kills it.
#[derive(Debug)]
pub struct NodeProcess {
    child: Child,
    /// The process ends when this is closed, so that it never outlives the test.
    _stdin: ChildStdin,
}

impl NodeProcess {
    /// Starts the program and waits until its overlay is ready.
    ///
    /// # Panics
    /// If it ends before.
    #[allow(
        clippy::disallowed_methods,
        reason = "replacing the process is what is tested"
    )]
    pub fn start(program: &str, ns: &Ns, node: NodeId, store: MemoryState) -> Self {
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program can be started");
        let orders = Orders {
            namespace: ns.path().to_owned(),
            node,
            store,
        };
        let mut line = serde_json::to_string(&orders).expect("plain data");
        line.push('\n');
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin.write_all(line.as_bytes()).expect("it is read");
        let stdout = child.stdout.take().expect("it is piped");
        let mut answer = String::new();
        BufReader::new(stdout)
            .read_line(&mut answer)
            .expect("it can be read");
        assert_eq!(answer, "ready\n", "the node process failed");
        Self {
            child,
            _stdin: stdin,
        }
    }

    /// Ends the process by SIGKILL, without a chance to do anything.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // That it has ended already is fine.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        self.end();
    }
}
