//! [`TcpSwitch`]: a TCP address whose way to a server can be cut, frozen and turned.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// An address on the loopback interface that leads to a server, or to another, or to none.
///
/// Needs a tokio runtime with I/O. Dropping it closes everything.
#[derive(Debug)]
pub struct TcpSwitch {
    address: SocketAddr,
    state: watch::Sender<State>,
    accepted: Arc<Mutex<u64>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    /// Where connections lead; `None`: they are closed at once.
    target: Option<SocketAddr>,
    /// Whether bytes are held up.
    frozen: bool,
    /// Connections of an earlier generation are closed.
    generation: u64,
    /// On connections that were made before this time nothing comes any more.
    strandings: u64,
}

impl TcpSwitch {
    /// A switch that leads to a server.
    ///
    /// # Errors
    /// No port is free.
    pub async fn new(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (state, states) = watch::channel(State {
            target: Some(target),
            frozen: false,
            generation: 0,
            strandings: 0,
        });
        let accepted = Arc::new(Mutex::new(0));
        let count = Arc::clone(&accepted);
        let task = tokio::spawn(async move {
            loop {
                // An error is that of one connection, or of too many files for now.
                let Ok((client, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                *count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                tokio::spawn(connect(client, states.clone()));
            }
        });
        Ok(Self {
            address,
            state,
            accepted,
            task,
        })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> u64 {
        *self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes every connection; new ones lead where they did.
    pub fn interrupt(&self) {
        self.state.send_modify(|state| state.generation += 1);
    }

    /// Closes every connection and leads new ones to another server, or nowhere.
    pub fn turn(&self, target: Option<SocketAddr>) {
        self.state.send_modify(|state| {
            state.target = target;
            state.generation += 1;
        });
    }

    /// Lets nothing come any more on the connections that there are, as when the address that they are
    /// bound to is gone: neither end hears of it. New ones lead where they did.
    pub fn strand(&self) {
        self.state.send_modify(|state| state.strandings += 1);
    }

    /// Holds all bytes up, both ways, or lets them go on.
    pub fn freeze(&self, yes: bool) {
        self.state.send_modify(|state| state.frozen = yes);
    }
}

impl Drop for TcpSwitch {
    fn drop(&mut self) {
        self.task.abort();
        self.interrupt();
    }
}

async fn connect(client: TcpStream, mut states: watch::Receiver<State>) {
    let begun = *states.borrow_and_update();
    let Some(target) = begun.target else { return };
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let there = copy(from_client, to_server, states.clone(), begun);
    let back = copy(from_server, to_client, states.clone(), begun);
    // A switch that is gone has closed everything, too.
    let closed = states.wait_for(|state| state.generation != begun.generation);
    tokio::select! {
        () = there => {}
        () = back => {}
        _ = closed => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut states: watch::Receiver<State>,
    begun: State,
) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let Ok(len @ 1..) = from.read(&mut buffer).await else {
            return;
        };
        let thawed = states
            .wait_for(|state| !state.frozen && state.strandings == begun.strandings)
            .await
            .is_ok();
        let Some(bytes) = buffer.get(..len).filter(|_| thawed) else {
            return;
        };
        if to.write_all(bytes).await.is_err() {
            return;
        }
    }
}
