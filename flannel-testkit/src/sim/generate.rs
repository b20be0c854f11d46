//! Histories drawn from a seed: what happens, to whom, and how long after one another.

use std::time::Duration;

use flannel_core::Rng;

use super::History;
use super::action::{
    Action, CrashPoint, Debris, Delivery, Fails, GoAction, Hostile, KernelAction, Kind, LinkAction,
    Master, NodeAction, Renaming, StateFault, Step, StoreAction, WireAction,
};
use crate::permute::below;

/// Draws a history.
pub(super) fn history(seed: u64, nodes: usize, steps: usize, configs: usize) -> History {
    let mut draw = Draw(Rng::new(seed));
    let nodes = nodes.max(1);
    let ttl = *draw.one_of(&[None, Some(30), Some(60), Some(180)]);
    // Half of all histories begin with the first config.
    let config = if draw.one_in(2) {
        0
    } else {
        draw.below(configs)
    };
    let gos = [0, 0, 0, 1, 2][draw.below(5)];
    let starts = (0..nodes).map(|node| Action::Node(node, NodeAction::Start));
    let go_starts = (0..gos).map(|peer| Action::Go(peer, GoAction::Start));
    let mut actions: Vec<Step> = Vec::new();
    for action in starts.chain(go_starts) {
        let then = draw.pause();
        actions.push(Step { action, then });
    }
    for _ in 0..steps {
        let node = draw.below(nodes);
        let action = if gos > 0 && draw.one_in(20) {
            draw.go_action(gos)
        } else {
            draw.action(node, nodes, configs)
        };
        let then = draw.pause();
        actions.push(Step { action, then });
    }
    History {
        seed,
        nodes,
        gos,
        config,
        ttl: ttl.map(Duration::from_secs),
        actions,
    }
}

struct Draw(Rng);

impl Draw {
    fn below(&mut self, limit: usize) -> usize {
        below(&mut self.0, limit)
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    fn byte(&mut self, limit: u8) -> u8 {
        u8::try_from(self.below(limit.into())).unwrap_or_default()
    }

    /// A time up to a number of milliseconds, as often short as long.
    fn time(&mut self, most: u64) -> Duration {
        let orders = usize::try_from(64 - most.leading_zeros()).unwrap_or(1);
        let limit = (1_u64 << self.below(orders + 1)).min(most);
        Duration::from_millis(
            u64::try_from(self.below(usize::try_from(limit).unwrap_or(1) + 1)).unwrap_or(limit),
        )
    }

    fn pause(&mut self) -> Duration {
        match self.below(20) {
            0..=3 => Duration::ZERO,
            4..=14 => self.time(3_000),
            15..=18 => self.time(30_000),
            _ => self.time(240_000),
        }
    }

    fn action(&mut self, node: usize, nodes: usize, configs: usize) -> Action {
        match self.below(100) {
            0..=4 => Action::Wait,
            5..=24 => Action::Node(node, self.node_action()),
            25..=44 => Action::Link(node, self.link_action()),
            45..=77 => Action::Kernel(node, self.kernel_action()),
            _ => Action::Store(self.store_action(nodes, configs)),
        }
    }

    fn node_action(&mut self) -> NodeAction {
        match self.below(21) {
            20 => NodeAction::Rename(*self.one_of(&Renaming::ALL)),
            0..=4 => NodeAction::Start,
            5 => NodeAction::Stop,
            6 => NodeAction::Leave,
            7 | 8 => NodeAction::Crash(CrashPoint::Now),
            9 => NodeAction::Crash(CrashPoint::Before(self.byte(12))),
            10 => NodeAction::Crash(CrashPoint::After(self.byte(12))),
            11 => NodeAction::Crash(CrashPoint::InBatch(self.byte(12))),
            12 => NodeAction::Reboot,
            13 => NodeAction::Suspend,
            14 | 15 => NodeAction::Resume,
            16 => NodeAction::Jump(self.time(400_000)),
            _ => NodeAction::State(*self.one_of(&[
                StateFault::WriteFails,
                StateFault::WriteTorn,
                StateFault::ReadFails,
                StateFault::Lost,
                StateFault::Old,
            ])),
        }
    }

    fn go_action(&mut self, gos: usize) -> Action {
        let what = if self.one_in(3) {
            GoAction::Kill
        } else {
            GoAction::Start
        };
        Action::Go(self.below(gos), what)
    }

    fn wire_action(&mut self) -> WireAction {
        let (after, hangs) = (self.byte(6), self.one_in(2));
        match self.below(26) {
            0 => WireAction::Cut,
            1 => WireAction::Refuse,
            2 => WireAction::Deny,
            3..=6 => WireAction::Heal,
            7 => WireAction::Latency(self.time(2_000)),
            8 => WireAction::Latency(Duration::ZERO),
            9 => WireAction::LoseRequest { after, hangs },
            10 | 11 => WireAction::LoseAnswer { after, hangs },
            12 => WireAction::Park { after, hangs },
            13 => WireAction::DeliverParked,
            // Only what is held comes in batches that can be squashed, reordered and split.
            14..=16 => WireAction::Deliver(self.byte(64) | 16),
            // What was held comes squashed or in another order, or both.
            17..=20 => WireAction::Deliver((self.byte(64) & !16) | (1 + after % 3)),
            21 => WireAction::Deliver(0),
            22 | 23 => WireAction::Break,
            _ => WireAction::Deafen,
        }
    }

    fn link_action(&mut self) -> LinkAction {
        match self.below(36) {
            0 | 1 => LinkAction::Cut {
                silent: self.one_in(2),
            },
            2..=6 => LinkAction::Heal,
            7 => LinkAction::Delay(self.time(20_000)),
            8 => LinkAction::Delay(Duration::ZERO),
            9 | 10 => LinkAction::LoseRequest,
            11 | 12 => LinkAction::LoseAnswer,
            13..=16 => {
                let delivery = *self.one_of(&[
                    Delivery::Late,
                    Delivery::Reordered,
                    Delivery::Repeated,
                    Delivery::Squashed,
                ]);
                // What is held for less holds nothing that could come in another way.
                let time = self.time(20_000).max(Duration::from_secs(4));
                LinkAction::Hold(time, delivery)
            }
            17 => LinkAction::Break,
            18 => LinkAction::End,
            19 => LinkAction::Resnapshot,
            _ => LinkAction::Wire(self.wire_action()),
        }
    }

    fn kernel_action(&mut self) -> KernelAction {
        let fails = *self.one_of(&Fails::ALL);
        let kind = *self.one_of(&Kind::ALL);
        let n = self.byte(32);
        match self.below(48) {
            40..=47 => self.uplink_action(n),
            0..=5 => KernelAction::FailOp(kind, fails),
            6 | 7 => KernelAction::FailKey(n, fails),
            8..=10 => KernelAction::FailObserve(fails),
            11 => KernelAction::ApplyTimesOut(n % 8),
            12 => KernelAction::DeviceDeleted(n % 8),
            13 => KernelAction::Overrun,
            14 | 15 => self.hint_action(),
            16 => KernelAction::Refuse(n, fails),
            17 => KernelAction::Accept,
            18 => KernelAction::Latency(self.time(500)),
            19 => KernelAction::Latency(Duration::ZERO),
            20..=25 => KernelAction::Delete(kind, n),
            26..=31 => KernelAction::Alter(kind, n),
            32 if n.is_multiple_of(2) => KernelAction::Unmark(n / 2),
            32 => KernelAction::LinkDown(n),
            33 if n.is_multiple_of(2) => KernelAction::ForeignDevice(n / 2),
            33 => KernelAction::ForeignRoute(n),
            34 => KernelAction::ForeignGone,
            35 => KernelAction::UnderlayDown,
            // No draw of its own: other histories stay what they were.
            37 if n.is_multiple_of(2) => match n / 2 % 4 {
                0 => KernelAction::ForwardingOff,
                1 => KernelAction::ForwardingOn,
                2 => KernelAction::RuleInFront,
                _ => KernelAction::RuleGone,
            },
            36 | 37 => KernelAction::UnderlayUp,
            38 => *self.one_of(&[
                KernelAction::UnderlayRemade,
                KernelAction::UnderlayMtu(1400),
                KernelAction::UnderlayMtu(1500),
                KernelAction::UnderlayMtu(9000),
            ]),
            _ => KernelAction::UnderlayAddress(n),
        }
    }

    fn uplink_action(&mut self, n: u8) -> KernelAction {
        let mut time = |all: &[u64]| Duration::from_millis(*self.one_of(all));
        match n % 16 {
            0 | 1 => KernelAction::UnderlayRenamed,
            2..=4 => KernelAction::UnderlayPort(*self.one_of(&Master::ALL)),
            5..=7 => KernelAction::UnderlayFree,
            8 => KernelAction::UnderlayFlap(time(&[100, 800, 2_500, 4_000, 12_000])),
            9 | 10 => KernelAction::UnderlayBare,
            11 | 12 => KernelAction::UnderlayDressed,
            13 => KernelAction::UnderlayRenumbered(n / 16 + 1, time(&[0, 300, 900, 5_000])),
            14 => KernelAction::SecondUplink,
            _ => KernelAction::SecondUplinkGone,
        }
    }

    fn hint_action(&mut self) -> KernelAction {
        match self.below(6) {
            0 | 1 => KernelAction::HintsLost,
            2 => KernelAction::HintsTorn,
            3 => KernelAction::HintsRepeated,
            4 => KernelAction::HintsReordered,
            _ => KernelAction::HintsLate(self.time(4_000)),
        }
    }

    fn store_action(&mut self, nodes: usize, configs: usize) -> StoreAction {
        let node = self.below(nodes);
        let n = self.byte(64);
        match self.below(24) {
            0..=9 => StoreAction::Put(*self.one_of(&Hostile::ALL), node, n),
            10 => StoreAction::Take(node),
            11 => StoreAction::RemoveOf(node),
            12 if n.is_multiple_of(4) => StoreAction::Empty {
                all: n.is_multiple_of(8),
            },
            12 => StoreAction::Remove(n),
            13 | 14 => StoreAction::Garble(node),
            15 if n < 8 => StoreAction::Junk(n % 4),
            15 => StoreAction::Debris(Debris::ALL[usize::from(n) % Debris::ALL.len()], node, n / 5),
            16 => StoreAction::Config(self.below(configs)),
            17 => StoreAction::BadConfig,
            18 | 19 => StoreAction::Backup,
            20 => StoreAction::Restore,
            21 => StoreAction::Compact,
            22 => StoreAction::Reserve(node),
            _ => StoreAction::Unreserve(node),
        }
    }
}
