//! A packet path that carries no packet, on a fake kernel.
#![allow(dead_code, reason = "shared by several test binaries")]

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use flannel_backend_udp::{PacketPath, Peers, Running};
use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Change, ChangeStream, IfName, Kernel, LinkKind, Note, Object, ObjectKey, Scope, Traffic, Tun,
    Tunnel,
};
use flannel_testkit::fake_kernel::FakeKernel;
use tokio::sync::mpsc;

/// A packet path on the devices of a fake kernel: it goes with them.
#[derive(Debug)]
pub(crate) struct FakePath {
    kernel: FakeKernel,
    running: Mutex<BTreeMap<IfName, (u32, Running)>>,
    hints: Mutex<Vec<mpsc::Sender<Change>>>,
}

impl FakePath {
    pub(crate) fn new(kernel: FakeKernel) -> Self {
        Self {
            kernel,
            running: Mutex::default(),
            hints: Mutex::default(),
        }
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<IfName, (u32, Running)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<mpsc::Sender<Change>>> {
        self.hints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The packet path of a device ends by itself.
    pub(crate) fn die(&self, dev: IfName) {
        self.all().remove(&dev);
        for listener in self.listeners().iter() {
            listener
                .try_send(Change::Link(Some(dev)))
                .expect("it is read");
        }
    }

    /// The index of a device: it changes when the device is made anew.
    fn index(&self, dev: IfName) -> Option<u32> {
        let scope = Scope::default();
        let mut reading = self.kernel.observe(&scope);
        let mut cx = Context::from_waker(Waker::noop());
        match reading.as_mut().poll(&mut cx) {
            Poll::Ready(Ok(observed)) => {
                let link = observed.links.iter().find(|link| link.name == dev)?;
                Some(link.index)
            }
            _ => None,
        }
    }
}

#[async_trait]
impl PacketPath for FakePath {
    fn running(&self) -> Vec<Running> {
        let mut all = self.all();
        all.retain(|dev, (index, _)| self.index(*dev) == Some(*index));
        all.values().map(|(_, running)| running.clone()).collect()
    }

    async fn open(&self, tunnel: &Tunnel) -> Result<()> {
        let dev = tunnel.dev;
        let no_device = || Error::NoSuchDevice {
            dev: dev.to_string(),
        };
        let index = self.index(dev).ok_or_else(no_device)?;
        match self.kernel.get(&ObjectKey::Link(dev)) {
            Some(Object::Link(link)) if link.kind == LinkKind::Tun(Tun::FOR_TUNNEL) => {}
            _ => {
                return Err(Error::Rejected {
                    message: "no TUN device".to_owned(),
                });
            }
        }
        let running = Running {
            tunnel: tunnel.clone(),
            peers: Arc::default(),
        };
        self.all().insert(dev, (index, running));
        Ok(())
    }

    async fn alter(&self, tunnel: &Tunnel) -> Result<()> {
        if let Some((_, running)) = self.all().get_mut(&tunnel.dev) {
            running.tunnel = tunnel.clone();
        }
        Ok(())
    }

    async fn set_peers(&self, dev: IfName, peers: Arc<Peers>) -> Result<()> {
        match self.all().get_mut(&dev) {
            Some((_, running)) => running.peers = peers,
            None => {
                return Err(Error::NotFound {
                    message: dev.to_string(),
                });
            }
        }
        Ok(())
    }

    async fn close(&self, dev: IfName) {
        self.all().remove(&dev);
    }

    fn traffic(&self) -> Vec<Traffic> {
        let all = self.all();
        let counts = [("spoofed".to_owned(), 7)];
        let traffic = all.keys().map(|dev| Traffic::new(*dev, counts.clone()));
        traffic.collect()
    }

    fn notes(&self) -> Vec<Note> {
        let all = self.all();
        let notes = all.keys().map(|dev| Note {
            topic: "packet-path".to_owned(),
            text: format!("{dev}: it carries nothing"),
        });
        notes.collect()
    }

    fn hints(&self) -> ChangeStream {
        let (sender, receiver) = mpsc::channel(64);
        self.listeners().push(sender);
        Box::pin(Hints(receiver))
    }
}

struct Hints(mpsc::Receiver<Change>);

impl futures_core::Stream for Hints {
    type Item = Change;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        self.0.poll_recv(cx)
    }
}
