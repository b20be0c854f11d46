//! The memory that a peer takes, and the part of it that stays when the peers are gone.
//!
//! Each number of peers is measured in a process of its own, so that nothing is left of what was done
//! before: a node of VXLAN on a real kernel, whose part does not count. The store is none of the process's
//! either, as with etcd: the records are made for each reading of it, and given away.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::sleep;
use std::time::Duration;

use async_trait::async_trait;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::manager::{self, LeaseRequest};
use flannel_core::{
    Capabilities, DualStack, Event, EventStream, Lease, Manager, MemoryManager, NetworkConfig,
    Overlay,
};
use flannel_e2e::config;
use flannel_netlink::NetlinkKernel;
use flannel_testkit::netns::Lab;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

use crate::bed::{kernel_is_free, node};
use crate::{CONFIG, GOOD, Table, progress};

/// The argument by which this program is such a process.
pub(crate) const CHILD: &str = "memory-of";

/// The numbers of peers.
const SIZES: [u32; 2] = [2_000, 30_000];
/// The most bytes that a peer may take.
const EACH: u64 = 3_000;
/// The most that may stay when they are gone, as a multiple of what a process takes that had none.
const LEFT: f64 = 1.5;
/// From the last change until it is measured: everything is read at least once meanwhile.
const REST: Duration = Duration::from_secs(60);

pub(crate) fn measure(table: &mut Table) {
    let idle = Resident::of(0);
    table.line("resident, no peers", &mb(idle.full), "", true);
    for peers in SIZES {
        let Resident { full, most, left } = Resident::of(peers);
        let each = full.saturating_sub(idle.full) / u64::from(peers);
        table.line(
            &format!("resident, {peers} peers (most until then)"),
            &format!("{} ({}), {each} bytes a peer", mb(full), mb(most)),
            &format!("<= {EACH} bytes"),
            each <= EACH,
        );
        let ratio = left as f64 / idle.full as f64;
        table.line(
            &format!("resident a minute after {peers} peers are gone"),
            &format!("{}, {ratio:.2} times as with none", mb(left)),
            &format!("<= {LEFT}"),
            ratio <= LEFT,
        );
    }
}

fn mb(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// The resident memory of a process, in bytes.
struct Resident {
    /// With its peers.
    full: u64,
    /// At most, until then.
    most: u64,
    /// When they are gone.
    left: u64,
}

impl Resident {
    /// Measures in a process of its own.
    fn of(peers: u32) -> Self {
        progress(&format!("memory of {peers} peers"));
        let this = std::env::current_exe().expect("this program");
        let child = Command::new(this)
            .args([CHILD, &peers.to_string()])
            .stderr(Stdio::inherit())
            .output()
            .expect("it starts");
        assert!(child.status.success(), "{}", child.status);
        let text = String::from_utf8(child.stdout).expect("text");
        let numbers = text
            .split_whitespace()
            .map(|n| n.parse().expect("a number"));
        match numbers.collect::<Vec<u64>>()[..] {
            [full, most, left] => Self { full, most, left },
            _ => panic!("not what a child says: {text}"),
        }
    }
}

/// The child: prints what it has resident.
pub(crate) fn child(peers: u32) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let lab = Lab::new("memory").unwrap_or_else(|error| panic!("{error}"));
    kernel_is_free();
    let underlay = lab.underlay(1).expect("an underlay");
    let (number, _) = watch::channel(peers);
    let number = Arc::new(number);
    let inner = MemoryManager::new(config(CONFIG));
    // None of the peers'.
    let own = "10.255.255.0/24".parse().expect("a subnet");
    let reserved = inner.reserve(&node(), DualStack::v4(own));
    reserved.expect("it is free");
    let store = Elsewhere {
        inner,
        peers: Arc::clone(&number),
    };
    let kernel = NetlinkKernel::in_namespace(underlay.nodes[0].ns.path()).expect("a kernel");
    let overlay = Overlay::builder(node())
        .manager(store)
        .backend(VxlanBackend::new())
        .kernel(kernel);
    let overlay = runtime.block_on(overlay.start()).expect("all parts");
    settled(&runtime, &overlay, peers);
    println!(
        "{} {}",
        memory("Rss", "smaps_rollup"),
        memory("VmHWM", "status")
    );
    number.send_replace(0);
    settled(&runtime, &overlay, 0);
    println!("{}", memory("Rss", "smaps_rollup"));
}

/// Waits until the kernel has what is wanted for so many peers, and a while longer.
fn settled(runtime: &Runtime, overlay: &Overlay, peers: u32) {
    runtime.block_on(overlay.ready()).expect("running");
    let known = overlay.wait_for(|status| status.peers == peers as usize);
    runtime.block_on(known).expect("running");
    runtime.block_on(overlay.converged()).expect("running");
    sleep(REST);
}

/// A number of the kernel's about this process, in bytes.
fn memory(what: &str, file: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).expect("readable");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(what)?.strip_prefix(':'));
    let kb = value.and_then(|value| value.split_whitespace().next());
    kb.and_then(|kb| kb.parse::<u64>().ok()).expect("a number") * 1024
}

/// A store in which the records of peers take no memory of this process.
#[derive(Debug)]
struct Elsewhere {
    /// Has our own record.
    inner: MemoryManager,
    /// The number of peers.
    peers: Arc<watch::Sender<u32>>,
}

#[async_trait]
impl Manager for Elsewhere {
    fn name(&self) -> &'static str {
        "elsewhere"
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn network_config(&self) -> manager::Result<NetworkConfig> {
        self.inner.network_config().await
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> manager::Result<Lease> {
        self.inner.acquire_lease(request).await
    }

    async fn renew_lease(&self, lease: &Lease) -> manager::Result<Lease> {
        self.inner.renew_lease(lease).await
    }

    async fn release_lease(&self, lease: &Lease) -> manager::Result<()> {
        self.inner.release_lease(lease).await
    }

    /// A snapshot now and whenever the number changes.
    fn watch_leases(&self) -> EventStream {
        let mut peers = self.peers.subscribe();
        peers.mark_changed();
        let inner = self.inner.clone();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while peers.changed().await.is_ok() {
                let number = *peers.borrow_and_update();
                let mut snapshot = inner.snapshot();
                snapshot.leases.extend((0..number).map(|n| GOOD.lease(n)));
                if sender.send(Ok(Event::Snapshot(snapshot))).is_err() {
                    return;
                }
            }
        });
        Box::pin(Received(receiver))
    }
}

struct Received(mpsc::UnboundedReceiver<manager::Result<Event>>);

impl futures_core::Stream for Received {
    type Item = manager::Result<Event>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}
