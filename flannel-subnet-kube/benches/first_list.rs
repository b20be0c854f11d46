//! Memory and time to the first snapshot of 5,000 Nodes from a real API server, against a program
//! that keeps whole Nodes, as an informer of client-go does: each a process of its own, in one run.
//!
//! `cargo bench -p flannel-subnet-kube` (needs etcd and the kube-apiserver of `cargo xtask setup`, no
//! root). Fails if a goal is missed.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that measures real time and memory and prints a table"
)]

use std::collections::BTreeMap;
use std::env;
use std::future::poll_fn;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use flannel_core::{Event, LeaseSet, Manager};
use flannel_subnet_kube::{Access, AnnotationPrefix, ConfigSource, KubeManager, KubeOptions};
use flannel_testkit::servers::KubeApiServer;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

const NODES: u32 = 5_000;

/// The most that the whole process may keep, in MB.
const GOAL: f64 = 40.0;

const ROUNDS: usize = 3;

/// A Node with all that a kubelet writes, about 10 KB.
fn node(n: u32) -> Value {
    let [_, _, high, low] = n.to_be_bytes();
    let cidr = format!("10.{}.{low}.0/24", high + 1);
    let images: Vec<Value> = (0..50)
        .map(|image| {
            let name = format!("registry.example.org/team-{}/image-{image}", n % 7);
            json!({
                "names": [format!("{name}@sha256:{:064x}", image * 7919 + 1), format!("{name}:v1.{image}")],
                "sizeBytes": 1_000_000 + image,
            })
        })
        .collect();
    let prefix = "flannel.alpha.coreos.com";
    json!({
        "metadata": {
            "name": format!("node-{n:05}"),
            "labels": {"kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "zone": "z"},
            "annotations": {
                format!("{prefix}/kube-subnet-manager"): "true",
                format!("{prefix}/backend-type"): "vxlan",
                format!("{prefix}/backend-data"):
                    format!("{{\"VNI\":1,\"VtepMAC\":\"0e:00:00:00:{high:02x}:{low:02x}\"}}"),
                format!("{prefix}/public-ip"): format!("198.18.{high}.{low}"),
            },
        },
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"images": images},
    })
}

fn fill(server: &KubeApiServer) {
    std::thread::scope(|scope| {
        for lane in 0..4 {
            scope.spawn(move || {
                for n in (0..NODES).filter(|n| n % 4 == lane) {
                    server.create("/api/v1/nodes", &node(n)).expect("made");
                }
            });
        }
    });
}

/// What the process keeps, and the most that it ever kept, in MB.
fn resident() -> (f64, f64) {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        number.expect("a number of kB") / 1024.0
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// One of the programs that are compared: prints its time in milliseconds and its memory.
async fn child(kind: &str, file: &Path) {
    let start = Instant::now();
    let kept: Box<dyn std::any::Any> = if kind == "ours" {
        let access = Access::kubeconfig(file, None);
        let config = ConfigSource::Text(r#"{"Network":"10.0.0.0/8"}"#.to_owned());
        let options = KubeOptions::new(access, config, AnnotationPrefix::default());
        let manager = KubeManager::new(options).expect("sound settings");
        let mut watch = manager.watch_leases();
        let first = poll_fn(|cx| watch.as_mut().poll_next(cx)).await;
        let Some(Ok(Event::Snapshot(snapshot))) = first else {
            panic!("no snapshot: {first:?}");
        };
        assert_eq!(snapshot.leases.len(), NODES as usize);
        let mut leases = LeaseSet::default();
        leases.apply(Event::Snapshot(snapshot));
        Box::new((watch, leases))
    } else {
        let read = Kubeconfig::read_from(file).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
        let client = Client::try_from(config.expect("sound")).expect("a client");
        let nodes: Api<Node> = Api::all(client);
        let mut all = BTreeMap::new();
        let mut page = ListParams::default().limit(500);
        loop {
            let list = nodes.list(&page).await.expect("an answer");
            for node in list.items {
                all.insert(node.metadata.name.clone(), node);
            }
            match list.metadata.continue_.filter(|more| !more.is_empty()) {
                Some(more) => page.continue_token = Some(more),
                None => break,
            }
        }
        assert_eq!(all.len(), NODES as usize);
        Box::new(all)
    };
    let time = start.elapsed().as_secs_f64() * 1e3;
    let (now, most) = resident();
    drop(kept);
    println!("{time} {now} {most}");
}

/// Runs one of the programs; answers its time, what it keeps and the most that it kept.
fn run(kind: &str, file: &Path) -> [f64; 3] {
    let ours = env::current_exe().expect("we run");
    let done = Command::new(ours).arg(kind).arg(file).output();
    let done = done.expect("it can be started");
    let out = String::from_utf8_lossy(&done.stdout);
    let mut numbers = out.split_whitespace().map(|word| word.parse().ok());
    let mut next = || numbers.next().flatten();
    match [next(), next(), next()] {
        [Some(time), Some(now), Some(most)] => [time, now, most],
        _ => panic!("{kind}: {out}{}", String::from_utf8_lossy(&done.stderr)),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if let [kind, file] = &args[..] {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        let runtime = runtime.expect("a runtime");
        runtime.block_on(child(kind, Path::new(file)));
        return ExitCode::SUCCESS;
    }
    let server = match KubeApiServer::start() {
        Ok(server) => server,
        Err(error) => {
            eprintln!("kube-apiserver does not start (`cargo xtask setup` builds it): {error}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("... writing {NODES} Nodes");
    fill(&server);
    let file = server.folder().join("kubeconfig");
    let kubeconfig = json!({
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {
            "server": server.url(), "certificate-authority": server.ca(),
        }}],
        "users": [{"name": "u", "user": {"token": server.admin_token()}}],
    });
    std::fs::write(&file, kubeconfig.to_string()).expect("written");
    let mut memory = Vec::new();
    let (mut ratios, mut times) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        eprintln!("... round {round} of {ROUNDS}");
        let (ours, whole) = (run("ours", &file), run("whole", &file));
        for (who, [time, now, most]) in [("slim Nodes", ours), ("whole Nodes", whole)] {
            println!("{who:>12}: {time:7.0} ms, {now:6.1} MB resident, {most:6.1} MB at most");
        }
        memory.push(ours[2]);
        ratios.push(whole[2] / ours[2]);
        times.push(whole[0] / ours[0]);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[ROUNDS / 2]
    };
    let (memory, ratio, time) = (median(&mut memory), median(&mut ratios), median(&mut times));
    println!(
        "median: {memory:.1} MB at most (goal: {GOAL}), {ratio:.1} times less than whole Nodes, \
         {time:.1} times as fast"
    );
    if memory <= GOAL {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
