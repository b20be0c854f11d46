//! The engine before it has its overlay: another process may be the overlay in this namespace, and
//! then nothing is changed, neither in the kernel nor in the store.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::{Command, Engine};
use crate::backoff::Backoff;
use crate::claim::{Claim, Claimant};
use crate::clock::Moment;
use crate::condition::{ConditionStatus, ConditionType};
use crate::kernel;
use crate::overlay::Error;

/// The time that whoever has the overlay may take to end before that is told: an overlay that was
/// just dropped, or a process that was just killed, is gone soon.
const PATIENCE: Duration = Duration::from_millis(500);

/// The wait between two tries within that time.
const SOON: Duration = Duration::from_millis(20);

/// The longest wait between two tries after that: a try is cheap, and who waits is to go on soon.
const LATER: Duration = Duration::from_secs(2);

/// Waits until somebody asks for the overlay.
pub(super) async fn asked_of(claim: &mut Option<Claim>) -> Claimant {
    match claim {
        Some(claim) => claim.asked().await,
        None => std::future::pending().await,
    }
}

/// A try to have the overlay, with what is to be answered after it.
#[derive(Debug)]
struct Waiting {
    since: Moment,
    tries: u32,
    /// The commands that need the claim, in the order in which they were asked.
    commands: VecDeque<Command>,
}

impl Engine {
    /// Waits until the overlay is ours; answers what was asked meanwhile and needs that, or why the
    /// engine ends.
    pub(super) async fn claim(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<VecDeque<Command>, String> {
        let mut waiting = Waiting {
            since: self.now(),
            tries: 0,
            commands: VecDeque::new(),
        };
        let later = Backoff::new(Duration::from_millis(100), LATER);
        loop {
            match self.try_to_claim(commands, &mut waiting).await? {
                Ok(claim) => {
                    self.claim = Some(claim);
                    let (kind, unknown) = (ConditionType::Kernel, ConditionStatus::Unknown);
                    self.condition(kind, unknown, "Starting", "", false);
                    return Ok(waiting.commands);
                }
                Err(error) => {
                    let is_told = self.now().since(waiting.since) >= PATIENCE;
                    if is_told {
                        self.not_claimed(&error);
                        for command in waiting.commands.drain(..) {
                            refuse(command, &error);
                        }
                        self.publish();
                    }
                    let wait = if is_told {
                        waiting.tries = waiting.tries.saturating_add(1);
                        later.after(waiting.tries, &mut self.parts.rng)
                    } else {
                        SOON
                    };
                    self.rest(wait, commands, &mut waiting).await?;
                }
            }
        }
    }

    async fn try_to_claim(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
        waiting: &mut Waiting,
    ) -> Result<kernel::Result<Claim>, String> {
        let kernel = Arc::clone(&self.parts.kernel);
        let (name, replace) = (self.parts.name.clone(), self.parts.options.replace_running);
        let mut answer = pin!(kernel.claim(&name, replace));
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return Ok(answer),
                command = commands.recv() => self.unclaimed(command, waiting).await?,
            }
        }
    }

    /// Waits for the next try; what needs the claim has it made at once.
    async fn rest(
        &mut self,
        wait: Duration,
        commands: &mut mpsc::Receiver<Command>,
        waiting: &mut Waiting,
    ) -> Result<(), String> {
        let mut end = pin!(tokio::time::sleep(wait));
        let before = waiting.commands.len();
        while waiting.commands.len() == before {
            tokio::select! {
                biased;
                command = commands.recv() => self.unclaimed(command, waiting).await?,
                () = &mut end => break,
            }
        }
        Ok(())
    }

    /// Does what the host program asks and needs no claim.
    async fn unclaimed(
        &mut self,
        command: Option<Command>,
        waiting: &mut Waiting,
    ) -> Result<(), String> {
        match command {
            None => Err("its handle was dropped".to_owned()),
            Some(command @ (Command::Release(_) | Command::Teardown(_))) => {
                waiting.commands.push_back(command);
                Ok(())
            }
            // Nothing is repaired yet, so that it was tried cannot be waited for.
            Some(Command::Resync(reply)) => {
                reply.send(()).ok();
                Ok(())
            }
            Some(
                command @ (Command::Plan(_)
                | Command::TeardownPlan(_)
                | Command::Reacquire(_)
                | Command::Interface(..)
                | Command::Stop(_)),
            ) => match self.command(command).await {
                Some(reason) => Err(reason),
                None => Ok(()),
            },
        }
    }

    /// Leaves the overlay to another process.
    pub(super) fn hand_over(&mut self, to: Claimant) -> String {
        tracing::info!(%to, "the overlay is handed over");
        self.stop_data_path();
        self.handed_to = Some(to);
        format!("it was handed over to {to}")
    }

    fn not_claimed(&mut self, error: &kernel::Error) {
        let kernel::Error::Held { by } = error else {
            let permanent = !error.is_transient();
            self.fails(
                ConditionType::Kernel,
                "NoKernel",
                error.to_string(),
                permanent,
            );
            return;
        };
        let name = &self.parts.name;
        let message = format!(
            "{by} runs the overlay {name} in this network namespace: stop it, start this one to replace \
             it (`replace_running`), or give this one another name"
        );
        self.fails(ConditionType::Kernel, "OverlayHeld", message, true);
    }
}

/// Answers what cannot be done while somebody else has the overlay.
fn refuse(command: Command, error: &kernel::Error) {
    let refusal = || match error {
        kernel::Error::Held { by } => kernel::Error::Held { by: *by },
        error => kernel::Error::Connection {
            reason: error.to_string(),
            source: None,
        },
    };
    let answer = |reply: oneshot::Sender<Result<(), Error>>| {
        reply.send(Err(Error::Kernel(refusal()))).ok();
    };
    match command {
        Command::Release(reply) | Command::Teardown(reply) => answer(reply),
        Command::Plan(_)
        | Command::TeardownPlan(_)
        | Command::Resync(_)
        | Command::Reacquire(_)
        | Command::Interface(..)
        | Command::Stop(_) => {}
    }
}
