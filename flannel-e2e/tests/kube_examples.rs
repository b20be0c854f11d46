//! The example on Kubernetes, run as users run it: two terminals and an API server make a cluster.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::disallowed_methods,
    reason = "`ip` and `ping` are the independent observers"
)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use flannel_e2e::{Program, V4};
use flannel_testkit::netns::Lab;
use flannel_testkit::require_tool;
use flannel_testkit::servers::KubeApiServer;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const NODE: &str = env!("CARGO_BIN_EXE_flannel-e2e-kube-node");
const PREFIX: &str = "flannel.alpha.coreos.com";

/// Terminals on one machine with an API server.
struct Bench {
    server: KubeApiServer,
    lab: String,
    kubeconfig: PathBuf,
    net_conf: PathBuf,
}

impl Bench {
    fn new(test: &str) -> Option<Self> {
        if !KubeApiServer::require(test) {
            return None;
        }
        for tool in ["ip", "ping"] {
            if !require_tool(test, tool) {
                return None;
            }
        }
        // Only asks whether there may be namespaces.
        Lab::for_test(test)?;
        let server = KubeApiServer::start().expect("a server");
        let kubeconfig = server.folder().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: '{}', certificate-authority: '{}'}}}}]\n\
             users: [{{name: u, user: {{token: {}}}}}]\n",
            server.url(),
            server.ca().display(),
            server.admin_token(),
        );
        fs::write(&kubeconfig, text).expect("written");
        let net_conf = server.folder().join("net-conf.json");
        fs::write(&net_conf, V4).expect("written");
        Some(Self {
            lab: format!("t{}-{test}", std::process::id()),
            server,
            kubeconfig,
            net_conf,
        })
    }

    /// Types the command of the README into a terminal of its own.
    fn node(&self, name: &str, more: &[&str]) -> Program {
        let [kubeconfig, net_conf] =
            [&self.kubeconfig, &self.net_conf].map(|path| path.to_str().expect("UTF-8"));
        let args = ["--kubeconfig", kubeconfig, "--net-conf", net_conf];
        let place = ["--lab", &self.lab, "--node", name];
        Program::start(NODE, &[&args[..], &place, more].concat())
    }

    /// Pings an address from the pod of a node.
    fn pings(&self, from: &str, ip: &str) -> bool {
        let pod = format!("{}-{from}-pod", self.lab);
        let ping = ["netns", "exec", &pod, "ping", "-c", "1", "-W", "2", ip];
        let done = Command::new("ip").args(ping).output().expect("ip runs");
        done.status.success()
    }

    /// One of flannel's annotations of a Node as it stands.
    fn annotation(&self, name: &str, key: &str) -> Value {
        let node = self.server.node(name).expect("an answer");
        node.expect("the Node is there")["metadata"]["annotations"][format!("{PREFIX}/{key}")]
            .clone()
    }

    /// The namespaces of the lab that are there.
    fn namespaces(&self) -> Vec<String> {
        let all = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(&self.lab)).collect()
    }
}

impl Drop for Bench {
    /// What a test leaves that has failed.
    fn drop(&mut self) {
        for name in self.namespaces() {
            let del = ["netns", "del", &name];
            Command::new("ip").args(del).output().ok();
        }
    }
}

fn send(program: &Program, signal: Signal) {
    let pid = i32::try_from(program.id()).expect("Linux has no larger ones");
    kill(Pid::from_raw(pid), signal).expect("it runs");
}

#[test]
fn two_terminals_make_a_cluster_and_leave_nothing_behind() {
    let Some(bench) = Bench::new("kube-two") else {
        return;
    };
    for (name, cidr) in [("a", "10.42.1.0/24"), ("b", "10.42.2.0/24")] {
        bench.server.add_node(name, &[cidr]).expect("made");
    }
    let (a, b) = (bench.node("a", &[]), bench.node("b", &["--teardown"]));
    let ready = a.line("ready node=a ");
    assert!(
        ready.starts_with("ready node=a subnet=10.42.1.0/24 mtu=1450 backend=vxlan"),
        "{ready}"
    );
    b.line("ready node=b subnet=10.42.2.0/24 ");
    assert_eq!(bench.annotation("a", "kube-subnet-manager"), "true");
    // One of the two was first, and hears of the other after its own line; the other before.
    let before = std::time::Instant::now();
    while !(bench.pings("a", "10.42.2.2") && bench.pings("b", "10.42.1.2")) {
        assert!(before.elapsed().as_secs() < 30, "the pods do not meet");
    }

    // Somebody meddles: it is told and made good.
    let patch = json!({"metadata": {"annotations": {format!("{PREFIX}/backend-type"): "ipip"}}});
    bench.server.merge("/api/v1/nodes/a", &patch).expect("done");
    let told = a.line("restored node=a annotation=");
    assert_eq!(
        told,
        "restored node=a annotation=backend-type found=\"ipip\""
    );
    assert_eq!(bench.annotation("a", "backend-type"), "vxlan");

    // Torn down: its record is gone, and so is it from the other.
    send(&b, Signal::SIGTERM);
    assert_eq!(b.end().0, 0);
    assert_eq!(bench.annotation("b", "kube-subnet-manager"), Value::Null);
    a.line("peer removed node=b subnet=10.42.2.0/24");
    send(&a, Signal::SIGINT);
    assert_eq!(a.end().0, 0);
    assert_eq!(bench.namespaces(), [""; 0]);
    // Without --teardown the record stays, as the data path would.
    assert_eq!(bench.annotation("a", "backend-type"), "vxlan");
}

#[test]
fn what_is_wrong_is_said_with_the_remedy() {
    let Some(mut bench) = Bench::new("kube-wrong") else {
        return;
    };
    let said = |program: Program| {
        let (code, out, why) = program.end();
        assert_eq!((code, out.as_str()), (1, ""), "{why}");
        assert_eq!(why.lines().count(), 1, "{why}");
        why
    };
    let why = said(bench.node("nobody", &[]));
    assert!(
        why.contains("no Node nobody") && why.contains("--node"),
        "{why}"
    );
    bench.server.add_node("a", &["10.42.1.0/24"]).expect("made");
    fs::remove_file(&bench.net_conf).expect("removed");
    let why = said(bench.node("a", &[]));
    assert!(why.contains("\"Network\": \"10.244.0.0/16\""), "{why}");
    fs::write(&bench.net_conf, "{").expect("written");
    assert!(said(bench.node("a", &[])).contains("--net-conf"));
    fs::write(&bench.net_conf, V4).expect("written");
    bench.server.kill();
    let why = said(bench.node("a", &[]));
    assert!(
        why.contains("does not answer") && why.contains("--kubeconfig"),
        "{why}"
    );
    let (code, _, why) = bench.node("a", &["--annotation-prefix", "nonsense"]).end();
    assert_eq!(code, 2, "{why}");
    assert_eq!(
        bench.namespaces(),
        [""; 0],
        "it leaves nothing when it fails"
    );
}
