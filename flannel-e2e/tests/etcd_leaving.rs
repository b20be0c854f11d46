//! A node of the UDP backend gives way: to the next version of its program, to one that it
//! cannot talk to, to Go flannel, and to nobody.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::disallowed_methods, reason = "`ip` is an independent observer")]

#[path = "etcd/bench.rs"]
#[allow(dead_code, reason = "another test's needs")]
mod bench;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bench::{Bench, CONFIG, NODE, send, subnet};
use flannel_e2e::{LIMIT, V4_UDP, until};
use flannel_testkit::prober::{self, Prober};
use nix::sys::signal::Signal;

/// A bench whose nodes have the UDP backend.
async fn bench(test: &str) -> Option<Bench> {
    let bench = Bench::new(test).await?;
    let mut client = bench.client().await;
    client.put(CONFIG, V4_UDP, None).await.expect("an answer");
    Some(bench)
}

/// The words of `ip` in the namespace of a node.
fn ip(bench: &Bench, node: &str, args: &[&str]) -> String {
    let ns = format!("{}-{node}", bench.lab);
    let output = Command::new("ip").args(["-n", &ns]).args(args).output();
    let output = output.expect("ip runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The id of the process that a node says it has left its packets to.
fn keeper(said: &str) -> u32 {
    let id = said.split("process ").nth(1).expect("it names a process");
    let id = id.split(' ').next().expect("a word");
    id.parse().unwrap_or_else(|error| panic!("{error}: {said}"))
}

fn lives(id: u32) -> bool {
    // One that has ended and is not waited for yet has no program.
    fs::read_link(format!("/proc/{id}/exe")).is_ok()
}

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("{test}-{}", std::process::id()));
        fs::create_dir(&path).expect("a folder");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("its mode");
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// An upgrade puts another file in the place of a program that runs.
#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_when_the_program_is_replaced_on_disk() {
    let Some(bench) = bench("upgrade").await else {
        return;
    };
    let folder = Folder::new("upgrade");
    let program = folder.file("node");
    let upgrade = || {
        let new = folder.file("new");
        fs::copy(NODE, &new).expect("a copy");
        fs::rename(new, &program).expect("it takes the place");
    };
    upgrade();
    let (mut a, b) = (bench.node_of(&program, "a", &[]), bench.node("b", &[]));
    let (ready_a, ready_b) = (a.line("ready node=a "), b.line("ready node=b "));
    let pods = [("a", &ready_a), ("b", &ready_b)].map(|(n, line)| bench.pod(n, &subnet(line)));
    until("they reach one another", LIMIT, async || {
        bench.pings("a", &subnet(&ready_b)) && bench.pings("b", &subnet(&ready_a))
    })
    .await;
    let options = prober::Options {
        packets: 60_000,
        rate: 1_000,
        ..prober::Options::default()
    };
    let [from, to] = &pods;
    let prober = Prober::start((&from.0, from.1), (&to.0, to.1), options).expect("a prober");
    let more = || {
        let enough = prober.received() + 300;
        assert!(prober.wait_received(enough, LIMIT), "packets flow");
    };
    let mut keepers = Vec::new();
    for _ in 0..2 {
        more();
        upgrade();
        send(&a, Signal::SIGTERM);
        let (code, _, said) = a.end();
        assert_eq!(code, 0, "{said}");
        let id = keeper(&said);
        assert!(lives(id), "{said}");
        keepers.push(id);
        // It goes by the name of the program that it is.
        let name = fs::read_to_string(format!("/proc/{id}/comm")).expect("it lives");
        assert_eq!(name.trim(), "node");
        more();
        a = bench.node_of(&program, "a", &[]);
        assert_eq!(a.line("ready node=a "), ready_a);
        more();
    }
    prober.stop();
    let report = prober.finish();
    assert_eq!(report.lost(), 0, "{report}");
    until("no keeper outlives its task", LIMIT, async || {
        !keepers.iter().any(|id| lives(*id))
    })
    .await;
}

/// Whatever listens on the socket, a program that is started starts.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_of_another_version_keeps_none_from_starting() {
    let Some(bench) = bench("version").await else {
        return;
    };
    let folder = Folder::new("version");
    // The node's namespace is there: what is kept of a lab that is gone is not asked for.
    let b = bench.node("b", &[]);
    b.line("ready node=b ");
    let a = bench.node("a", &["--release-path"]);
    a.line("ready node=a ");
    send(&a, Signal::SIGTERM);
    assert_eq!(a.end().0, 0);
    for (round, (versions, knows_the_word)) in [([3, 4], true), ([0, 0], false)].iter().enumerate()
    {
        let socket = folder.file(&round.to_string());
        let listener = UnixListener::bind(&socket).expect("a socket");
        let knows_the_word = *knows_the_word;
        let mut head = b"FLNUDP\0\x04\0\0".to_vec();
        head.extend(versions);
        head.extend([0, 0, 0, 0]);
        let other = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("it comes");
            stream.write_all(&head).expect("it is heard");
            let mut word = [0];
            stream.read_exact(&mut word).expect("it answers");
            if knows_the_word {
                stream.write_all(&[7]).expect("it is heard");
            }
            word[0]
        });
        let a = bench.node("a", &["--handover", &socket, "--release-path"]);
        if knows_the_word {
            let line = a.line("packet-path lost ");
            assert!(line.contains("versions 3 to 4"), "{line}");
        }
        a.line("ready node=a ");
        assert_eq!(other.join().expect("no panic"), 6);
        let mode = fs::metadata(&socket).expect("it is there").permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        send(&a, Signal::SIGTERM);
        assert_eq!(a.end().0, 0);
    }
}

/// A process that keeps packets ends when its time is up, when it is told to, and with its lab;
/// then nothing is left.
#[tokio::test(flavor = "multi_thread")]
async fn who_keeps_packets_ends_with_its_time_and_with_its_lab() {
    let Some(bench) = bench("hold").await else {
        return;
    };
    let b = bench.node("b", &[]);
    b.line("ready node=b ");
    let device = || ip(&bench, "a", &["link", "show", "flannel0"]);
    for how in ["its time", "a signal"] {
        let time = if how == "its time" { "2" } else { "600" };
        let a = bench.node("a", &["--hold-for", time]);
        a.line("ready node=a ");
        send(&a, Signal::SIGTERM);
        let (_, _, said) = a.end();
        let id = keeper(&said);
        assert!(said.contains(&format!("kill {id}")), "{said}");
        assert!(!device().is_empty());
        let start = Instant::now();
        if how == "a signal" {
            let pid = nix::unistd::Pid::from_raw(id.cast_signed());
            nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it lives");
        }
        until(how, LIMIT, async || !lives(id) && device().is_empty()).await;
        let limit = Duration::from_secs(5);
        assert!(start.elapsed() < limit, "{how}: {:?}", start.elapsed());
    }
    // README's lab, again and again.
    drop(b);
    for _ in 0..2 {
        let nodes = ["a", "b"].map(|name| bench.node(name, &[]));
        for (name, node) in ["a", "b"].iter().zip(&nodes) {
            node.line(&format!("ready node={name} "));
            send(node, Signal::SIGINT);
        }
        for node in nodes {
            let (code, _, said) = node.end();
            assert_eq!(code, 0, "{said}");
        }
        assert_eq!(bench.namespaces(), [""; 0]);
    }
}

/// The way back: what Go flannel is to make has a free name, a free port and no longer route beside
/// it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_way_of_go_flannel() {
    let Some(bench) = bench("back").await else {
        return;
    };
    let b = bench.node("b", &[]);
    let subnet_b = subnet(&b.line("ready node=b "));
    for how in ["released", "killed"] {
        let a = bench.node("a", &["--release-path"]);
        a.line("ready node=a ");
        let routes = || ip(&bench, "a", &["route"]);
        until("the route is made", LIMIT, async || {
            routes().contains(&subnet_b)
        })
        .await;
        if how == "released" {
            send(&a, Signal::SIGTERM);
            let (code, _, said) = a.end();
            assert_eq!(code, 0, "{said}");
            assert!(said.contains("nothing of the packet path"), "{said}");
            assert!(!bench.is_kept("a"));
        } else {
            a.kill();
        }
        until(how, LIMIT, async || {
            ip(&bench, "a", &["link", "show", "flannel0"]).is_empty()
        })
        .await;
        assert!(!routes().contains(&subnet_b), "{how}: {}", routes());
        go_flannel_starts(&bench, how);
    }
}

/// Does what Go flannel's UDP backend does at its start: a device by a pattern, one route to the
/// whole network, a socket.
fn go_flannel_starts(bench: &Bench, how: &str) {
    let ns = flannel_testkit::netns::Ns::named(&format!("{}-a", bench.lab));
    let ns = ns.expect("readable").expect("it is there");
    for args in [
        &["tuntap", "add", "flannel0", "mode", "tun"][..],
        &["address", "add", "10.5.200.0/32", "dev", "flannel0"],
        &["link", "set", "flannel0", "mtu", "1472", "up"],
        &["route", "add", "10.5.0.0/16", "dev", "flannel0"],
    ] {
        let made = ns.run(|| Command::new("ip").args(args).output());
        let made = made.expect("the namespace").expect("ip runs");
        let why = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "{how}: {args:?}: {why}");
    }
    let bound = ns.run(|| std::net::UdpSocket::bind("0.0.0.0:8285"));
    bound.expect("the namespace").expect("the port is free");
    let way = ip(bench, "a", &["route", "get", "10.5.77.9"]);
    assert!(way.contains("dev flannel0"), "{how}: {way}");
    ip(bench, "a", &["link", "delete", "flannel0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_is_not_made_where_others_may_write() {
    let Some(bench) = bench("folder").await else {
        return;
    };
    let folder = Folder::new("folder");
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o1777)).expect("its mode");
    let socket = folder.file("node.sock");
    let (code, _, why) = bench.node("a", &["--handover", &socket]).end();
    assert_eq!(code, 2, "{why}");
    assert!(
        why.contains("others may write") && why.contains("1777"),
        "{why}"
    );
    assert!(!Path::new(&socket).exists());
}
