//! Terminals on one machine.
#![allow(
    clippy::disallowed_methods,
    reason = "`ip` and `ping` are the independent observers"
)]

use std::fs;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::process::Command;

use etcd_client::Client;
use flannel_e2e::{Program, V4};
use flannel_testkit::netns::{Lab, Ns};
use flannel_testkit::require_tool;
use flannel_testkit::servers::Etcd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) const NODE: &str = env!("CARGO_BIN_EXE_flannel-e2e-etcd-node");
pub(crate) const CONFIG: &str = "/coreos.com/network/config";

/// Terminals on one machine with an etcd.
pub(crate) struct Bench {
    pub(crate) etcd: Etcd,
    pub(crate) lab: String,
}

impl Bench {
    pub(crate) async fn new(test: &str) -> Option<Self> {
        for tool in ["etcd", "ip", "ping"] {
            if !require_tool(test, tool) {
                return None;
            }
        }
        // Only asks whether there may be namespaces.
        Lab::for_test(test)?;
        let bench = Self {
            etcd: Etcd::start().expect("etcd starts"),
            lab: format!("t{}-{test}", std::process::id()),
        };
        let mut client = bench.client().await;
        client.put(CONFIG, V4, None).await.expect("an answer");
        Some(bench)
    }

    pub(crate) async fn client(&self) -> Client {
        let client = Client::connect([self.etcd.endpoint()], None).await;
        client.expect("a client")
    }

    /// Types the command of the README into a terminal of its own.
    pub(crate) fn node(&self, name: &str, more: &[&str]) -> Program {
        self.node_of(NODE, name, more)
    }

    /// The same with another file of the program.
    pub(crate) fn node_of(&self, program: &str, name: &str, more: &[&str]) -> Program {
        let endpoint = self.etcd.endpoint();
        let args = ["--endpoints", &endpoint, "--lab", &self.lab, "--node", name];
        Program::start(program, &[&args[..], more].concat())
    }

    /// Pings the pod of a subnet from the pod of a node.
    pub(crate) fn pings(&self, from: &str, to: &str) -> bool {
        let pod = format!("{}-{from}-pod", self.lab);
        let ip = to.replace(".0/24", ".2");
        let ping = ["netns", "exec", &pod, "ping", "-c", "1", "-W", "2", &ip];
        let done = Command::new("ip").args(ping).output().expect("ip runs");
        done.status.success()
    }

    /// The pod of a node, and its address.
    pub(crate) fn pod(&self, node: &str, subnet: &str) -> (Ns, IpAddr) {
        let ns = Ns::named(&format!("{}-{node}-pod", self.lab));
        let ip = subnet.replace(".0/24", ".2").parse();
        (
            ns.expect("readable").expect("it is there"),
            ip.expect("an address"),
        )
    }

    /// Tells if somebody would hand over the packets of a node.
    pub(crate) fn is_kept(&self, node: &str) -> bool {
        UnixStream::connect(format!("/run/flannel/{}-{node}.sock", self.lab)).is_ok()
    }

    /// The namespaces of the lab that are there.
    pub(crate) fn namespaces(&self) -> Vec<String> {
        let all = fs::read_dir("/run/netns")
            .expect("a lab was made")
            .flatten();
        let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut ours: Vec<String> = names
            .filter_map(|name| Some(name.strip_prefix(&self.lab)?.to_owned()))
            .collect();
        ours.sort();
        ours
    }
}

impl Drop for Bench {
    /// Removes the leftovers of a test that has failed.
    fn drop(&mut self) {
        for name in self.namespaces() {
            let name = format!("{}{name}", self.lab);
            Command::new("ip")
                .args(["netns", "del", &name])
                .output()
                .ok();
        }
    }
}

/// The subnet in a line such as `ready node=a subnet=10.5.1.0/24 mtu=1450 backend=vxlan`.
pub(crate) fn subnet(line: &str) -> String {
    let fields = line.split(' ');
    let mut values = fields.filter_map(|field| field.strip_prefix("subnet="));
    values.next().expect("the line has a subnet").to_owned()
}

/// Sends a program a signal.
pub(crate) fn send(program: &Program, signal: Signal) {
    let pid = i32::try_from(program.id()).expect("Linux has no larger ones");
    kill(Pid::from_raw(pid), signal).expect("it runs");
}
