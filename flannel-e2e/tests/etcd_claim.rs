//! Two processes that are one node, in one namespace: the second is refused, or replaces the first.
#![allow(missing_docs, reason = "tests")]

use std::future::poll_fn;
use std::path::PathBuf;
use std::task::Poll;
use std::time::Duration;

use etcd_client::Client;
use flannel_core::{Change, ChangeStream, Kernel, Scope};
use flannel_e2e::{Program, V4, V4_GW, V4_UDP, until};
use flannel_netlink::NetlinkKernel;
use flannel_testkit::netns::{Lab, Ns};
use flannel_testkit::require_tool;
use flannel_testkit::servers::Etcd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NODE: &str = env!("CARGO_BIN_EXE_flannel-e2e-etcd-node");
const CONFIG: &str = "/coreos.com/network/config";

/// A machine with an etcd of its own, and a peer that is only a record.
struct Machine {
    _lab: Lab,
    ns: Ns,
    etcd: Etcd,
    folder: PathBuf,
}

impl Machine {
    fn new(test: &str, config: &str, backend: &str) -> Option<Self> {
        if !require_tool(test, "etcd") {
            return None;
        }
        let lab = Lab::for_test(test)?;
        let underlay = lab.underlay(1).expect("an underlay");
        let ns = underlay.nodes[0].ns.clone();
        let etcd = ns.run(Etcd::start).expect("entered").expect("etcd starts");
        let folder = std::env::temp_dir().join(format!("{test}-{}", std::process::id()));
        let this = Self {
            _lab: lab,
            ns,
            etcd,
            folder,
        };
        this.put(CONFIG, config);
        let peer = match backend {
            "vxlan" => {
                r#"{"PublicIP":"192.0.2.77","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:77"}}"#
            }
            "host-gw" => r#"{"PublicIP":"192.0.2.77","BackendType":"host-gw"}"#,
            _ => r#"{"PublicIP":"192.0.2.77","BackendType":"udp"}"#,
        };
        this.put("/coreos.com/network/subnets/10.42.77.0-24", peer);
        Some(this)
    }

    fn put(&self, key: &str, value: &str) {
        let endpoint = self.etcd.endpoint();
        let put = || async move {
            let client = Client::connect([endpoint], None).await;
            let mut client = client.expect("a client");
            client.put(key, value, None).await.expect("an answer");
        };
        self.ns.block_on(put).expect("entered");
    }

    /// Starts the node of this machine once more.
    fn node(&self, more: &[&str]) -> Program {
        let endpoint = self.etcd.endpoint();
        let args = [&["--endpoints", &endpoint, "--node", "a"], more].concat();
        self.ns
            .run(|| Program::start(NODE, &args))
            .expect("entered")
    }

    fn kernel(&self) -> NetlinkKernel {
        NetlinkKernel::in_namespace(self.ns.path()).expect("a kernel")
    }

    fn socket(&self) -> String {
        self.folder.join("node.sock").to_string_lossy().into_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

fn send(program: &Program, signal: Signal) {
    kill(Pid::from_raw(program.id().cast_signed()), signal).expect("it runs");
}

/// The changes that the kernel has told of since it was asked last.
async fn told(changes: &mut ChangeStream) -> Vec<Change> {
    let mut all = Vec::new();
    tokio::time::sleep(Duration::from_millis(100)).await;
    poll_fn(|cx| {
        while let Poll::Ready(Some(change)) = changes.as_mut().poll_next(cx) {
            all.push(change);
        }
        Poll::Ready(())
    })
    .await;
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_is_refused_and_follows_when_the_first_is_killed() {
    let Some(machine) = Machine::new("twice", V4, "vxlan") else {
        return;
    };
    let first = machine.node(&[]);
    let ready = first.line("ready ");
    let mut changes = machine.kernel().changes();
    until("the watch is on", Duration::from_secs(5), async || {
        told(&mut changes).await.contains(&Change::All)
    })
    .await;
    for more in [&[][..], &["--teardown", "--run-for", "5"]] {
        let (code, out, why) = machine.node(more).end();
        assert_eq!(code, 1, "{why}");
        let named = format!("process {} runs the overlay flannel", first.id());
        assert!(why.contains(&named), "{why}");
        assert!(!out.contains("ready "), "{out}");
    }
    assert_eq!(told(&mut changes).await, []);
    first.kill();
    assert_eq!(machine.node(&[]).line("ready "), ready);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_replaced_by_request_and_the_kernel_is_not_touched() {
    let all = [("vxlan", V4), ("host-gw", V4_GW), ("udp", V4_UDP)];
    for (backend, config) in all {
        let Some(machine) = Machine::new(&format!("swap-{backend}"), config, backend) else {
            return;
        };
        let socket = machine.socket();
        let asks = ["--handover", socket.as_str(), "--status-every", "1"];
        let mut running = machine.node(&asks);
        let ready = running.line("ready ");
        while !running
            .line("status ")
            .contains(" peers=1 rejected=0 failing=0 foreign=0")
        {}
        let kernel = machine.kernel();
        let before = kernel.observe(&Scope::default()).await.expect("a state");
        let mut changes = kernel.changes();
        until("the watch is on", Duration::from_secs(5), async || {
            told(&mut changes).await.contains(&Change::All)
        })
        .await;
        for _ in 0..2 {
            let next = machine.node(&asks);
            assert_eq!(next.line("ready "), ready, "{backend}");
            let (code, _, why) = running.end();
            assert_eq!(code, 0, "{backend}: {why}");
            assert!(why.contains("another process is the node now"), "{why}");
            next.line("status ready=true working=true");
            running = next;
        }
        assert_eq!(told(&mut changes).await, [], "{backend}");
        let after = kernel.observe(&Scope::default()).await.expect("a state");
        assert_eq!(after, before, "{backend}");
        send(&running, Signal::SIGTERM);
        assert_eq!(running.end().0, 0);
    }
}
