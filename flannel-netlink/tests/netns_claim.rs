//! The lock of an overlay among processes: who has it, who asks for it, and who only seems to have it.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the other processes are this very program, and say on stdout how far they are"
)]

mod common;
mod strategies;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use flannel_core::kernel::Error;
use flannel_core::{Claim, Claimant, Kernel, OverlayName};
use flannel_netlink::NetlinkKernel;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use nix::unistd::{Pid, Uid, setuid};

/// Says to the child what it is.
const ROLE: &str = "FLANNEL_TEST_CLAIMANT";
/// The names of the lock of the overlay `flannel`.
const NAMES: [&str; 4] = [
    "flannel-overlay/flannel",
    "flannel-overlay/flannel/1",
    "flannel-overlay/flannel/2",
    "flannel-overlay/flannel/3",
];

fn flannel() -> OverlayName {
    OverlayName::default()
}

/// Another process in the namespace of the calling thread.
struct Other {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Other {
    fn start(role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "another_process", "--nocapture"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, out }
    }

    /// Waits until it is ready.
    fn ready(role: &str) -> Self {
        let mut this = Self::start(role);
        this.says("ready");
        this
    }

    fn says(&mut self, word: &str) {
        let mut line = String::new();
        while !line.trim_end().ends_with(word) {
            line.clear();
            let read = self.out.read_line(&mut line).expect("readable");
            assert_ne!(read, 0, "it ended before it was {word}");
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).expect("it runs");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Acts as the other process: not a test of its own.
#[test]
fn another_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let nobody = Uid::from_raw(65_534);
    let mut held: Vec<OwnedFd> = Vec::new();
    let mut claim: Option<Claim> = None;
    match role.as_str() {
        "holds" | "replaces" => {
            let kernel = NetlinkKernel::new().expect("a kernel");
            println!("\nstarted");
            let had = runtime.block_on(kernel.claim(&flannel(), role == "replaces"));
            claim = Some(had.expect("it is had"));
        }
        "binds" => {
            setuid(nobody).expect("root");
            held.push(bound(NAMES[0]));
        }
        "listens" => {
            setuid(nobody).expect("root");
            held.push(listener(NAMES[0]).into());
        }
        "takes-all" => {
            setuid(nobody).expect("root");
            held.extend(NAMES.map(|name| OwnedFd::from(listener(name))));
        }
        "is-full" => {
            setuid(nobody).expect("root");
            held.push(listener(NAMES[0]).into());
            held.extend(std::iter::from_fn(|| dial(NAMES[0])));
        }
        "dials" => {
            setuid(nobody).expect("root");
            println!("\nready");
            // Ends with the test that started it.
            loop {
                while dial(NAMES[0]).is_some() {}
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        other => panic!("{other}"),
    }
    println!("\nready");
    std::io::stdout().flush().expect("a reader");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).ok();
    drop((held, claim));
}

fn bound(name: &str) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).expect("a socket");
    let address = UnixAddr::new_abstract(name.as_bytes()).expect("a name");
    bind(fd.as_raw_fd(), &address).expect("it is free");
    fd
}

fn listener(name: &str) -> UnixListener {
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    UnixListener::bind_addr(&address).expect("it is free")
}

/// Connects, if there is room.
fn dial(name: &str) -> Option<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).expect("a socket");
    let address = UnixAddr::new_abstract(name.as_bytes()).expect("a name");
    connect(fd.as_raw_fd(), &address).ok().map(|()| fd)
}

/// Names who keeps an overlay from being claimed.
async fn held_by(kernel: &NetlinkKernel) -> Claimant {
    match kernel.claim(&flannel(), false).await {
        Err(Error::Held { by }) => by,
        other => panic!("{other:?}"),
    }
}

#[test]
fn whoever_has_an_overlay_is_named_and_its_death_frees_it() {
    netns(async |net| {
        let other = Other::ready("holds");
        let pid = other.child.id();
        assert_eq!(held_by(&net.kernel).await, Claimant::Process(pid));
        // One that does not run is named too, and keeps nobody waiting.
        other.signal(Signal::SIGSTOP);
        let start = Instant::now();
        for _ in 0..200 {
            // More often than there is room for in its queue, which is never emptied.
            let by = held_by(&net.kernel).await;
            assert!(
                by == Claimant::Process(pid) || by == Claimant::Silent,
                "{by}"
            );
            if by == Claimant::Silent {
                break;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(5));
        other.signal(Signal::SIGKILL);
        let start = Instant::now();
        until("it is free", async || {
            net.kernel.claim(&flannel(), false).await.is_ok()
        })
        .await;
        assert!(start.elapsed() < Duration::from_secs(1));
    });
}

#[test]
fn an_overlay_is_handed_over_to_another_process() {
    netns(async |net| {
        let mut claim = net.kernel.claim(&flannel(), false).await.expect("free");
        let mut other = Other::start("replaces");
        let asked = tokio::time::timeout(Duration::from_secs(10), claim.asked()).await;
        assert_eq!(asked.expect("it asks"), Claimant::Process(other.child.id()));
        drop(claim);
        other.says("ready");
        assert_eq!(
            held_by(&net.kernel).await,
            Claimant::Process(other.child.id())
        );
    });
}

#[test]
fn strangers_without_rights_keep_nobody_out_and_are_named() {
    for role in ["binds", "listens", "is-full"] {
        netns(async move |net| {
            let other = Other::ready(role);
            let claim = net.kernel.claim(&flannel(), false).await;
            let claim = claim.unwrap_or_else(|error| panic!("{role}: {error}"));
            let [note] = claim.notes() else {
                panic!("{role}: {:?}", claim.notes());
            };
            assert!(note.text.contains("user 65534"), "{role}: {}", note.text);
            if role == "listens" {
                let named = format!("process {} ", other.child.id());
                assert!(note.text.starts_with(&named), "{}", note.text);
            }
            // The lock is one all the same, also when the stranger has gone.
            let own = Claimant::Own(std::process::id());
            assert_eq!(held_by(&net.kernel).await, own, "{role}");
            drop(other);
            assert_eq!(held_by(&net.kernel).await, own, "{role}");
            drop(claim);
            net.kernel.claim(&flannel(), false).await.expect("free");
        });
    }
}

#[test]
fn an_overlay_whose_lock_strangers_have_wholly_is_had_without() {
    netns(async |net| {
        let other = Other::ready("takes-all");
        let claim = net.kernel.claim(&flannel(), false).await.expect("free");
        assert_eq!(claim.notes().len(), NAMES.len());
        drop(other);
        assert!(
            net.kernel
                .claim(&flannel(), false)
                .await
                .expect("free")
                .notes()
                .is_empty()
        );
        drop(claim);
    });
}

/// Whoever dials without end keeps neither the holder from hearing nor others from being told.
#[test]
fn dials_of_strangers_stall_nothing() {
    netns(async |net| {
        let mut claim = net.kernel.claim(&flannel(), false).await.expect("free");
        let dialers: Vec<Other> = (0..2).map(|_| Other::ready("dials")).collect();
        let before = cpu();
        let start = Instant::now();
        let own = Claimant::Own(std::process::id());
        assert_eq!(held_by(&net.kernel).await, own);
        assert!(start.elapsed() < Duration::from_secs(2));
        let name = flannel();
        let asks = net.kernel.claim(&name, true);
        let hands_over = async {
            let asked = tokio::time::timeout(Duration::from_secs(5), claim.asked()).await;
            drop(claim);
            asked.expect("it is heard")
        };
        let (had, asked) = tokio::join!(asks, hands_over);
        assert_eq!(asked, own);
        let _claim = had.expect("it is had");
        std::thread::sleep(Duration::from_secs(1));
        let spent = cpu() - before;
        assert!(spent < start.elapsed() / 3, "{spent:?} of a processor");
        drop(dialers);
    });
}

/// The processor time of this process.
fn cpu() -> Duration {
    let spent = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID);
    spent.expect("a clock").into()
}

/// A program that another one starts does not have its overlay.
#[test]
fn a_started_program_inherits_no_claim() {
    netns(async |net| {
        let claim = net.kernel.claim(&flannel(), false).await.expect("free");
        let mut sleeper = Command::new("sleep").arg("60").spawn().expect("it starts");
        drop(claim);
        let again = net.kernel.claim(&flannel(), false).await;
        again.expect("free");
        sleeper.kill().expect("it runs");
        sleeper.wait().expect("it ends");
    });
}

#[test]
fn an_overlay_of_another_namespace_is_another() {
    netns(async |net| {
        let _claim = net.kernel.claim(&flannel(), false).await.expect("free");
        let thread = std::thread::spawn(|| {
            netns(async |net| {
                let claim = net.kernel.claim(&flannel(), false).await;
                assert!(claim.is_ok(), "{claim:?}");
            })
        });
        thread.join().expect("the other namespace");
    });
}

/// A claim that nobody waits for any more is not had.
#[test]
fn an_abandoned_claim_is_free() {
    netns(async |net| {
        for _ in 0..20 {
            let name = flannel();
            let mut claim = net.kernel.claim(&name, false);
            let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(claim.as_mut().poll(cx)));
            drop(polled.await);
            drop(claim);
        }
        until("it is free", async || {
            net.kernel.claim(&flannel(), false).await.is_ok()
        })
        .await;
    });
}

/// Whoever connects and says nothing, or nonsense, is not heard, and does not fill the memory.
#[test]
fn nonsense_is_not_heard() {
    netns(async |net| {
        let mut claim = net.kernel.claim(&flannel(), false).await.expect("free");
        let address = SocketAddr::from_abstract_name(NAMES[0]).expect("a name");
        let mut callers: Vec<UnixStream> = Vec::new();
        for n in 0..100 {
            let mut stream = UnixStream::connect_addr(&address).expect("it listens");
            if n % 2 == 0 {
                stream.write_all(b"?").ok();
            }
            callers.push(stream);
        }
        let asked = tokio::time::timeout(Duration::from_millis(300), claim.asked()).await;
        assert!(asked.is_err(), "{asked:?}");
        assert_eq!(
            held_by(&net.kernel).await,
            Claimant::Own(std::process::id())
        );
        drop(callers);
    });
}
