//! The tables, and the goals.

use std::fmt;

use crate::congestion::BBR;
use crate::ways::WayKind;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Stream,
    Streams,
    Small,
    Flood,
    Median,
    Slow,
    Cpu,
}

impl Kind {
    pub(crate) const ALL: [Self; 7] = [
        Self::Stream,
        Self::Streams,
        Self::Small,
        Self::Flood,
        Self::Median,
        Self::Slow,
        Self::Cpu,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Stream => "TCP, Gbit/s",
            Self::Streams => "TCP, four streams, Gbit/s",
            Self::Small => "64-byte packets at 1 % loss, thousand/s",
            Self::Flood => "64-byte packets as fast as can be: lost, %",
            Self::Median => "round trip p50, µs",
            Self::Slow => "round trip p99, µs",
            Self::Cpu => "processor, s/GB",
        }
    }

    const fn show(self, value: f64) -> (usize, f64) {
        match self {
            Self::Stream | Self::Streams | Self::Cpu => (2, value),
            Self::Flood => (1, value),
            Self::Small | Self::Median | Self::Slow => (0, value),
        }
    }
}

/// A value for each kind; what was not measured is not a number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Values([f64; Kind::ALL.len()]);

impl Default for Values {
    fn default() -> Self {
        Self([f64::NAN; Kind::ALL.len()])
    }
}

impl Values {
    pub(crate) const fn set(&mut self, kind: Kind, value: f64) {
        self.0[kind as usize] = value;
    }

    const fn at(&self, kind: Kind) -> f64 {
        self.0[kind as usize]
    }
}

/// The rounds of some ways under one condition.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) what: String,
    pub(crate) ways: Vec<WayKind>,
    pub(crate) kinds: Vec<Kind>,
    rounds: Vec<Vec<Values>>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Table {
    pub(crate) fn new(what: &str, ways: Vec<WayKind>) -> Self {
        Self {
            what: what.to_owned(),
            ways,
            kinds: Kind::ALL.to_vec(),
            rounds: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, round: Vec<Values>) {
        self.rounds.push(round);
    }

    /// Leaves out what was not measured.
    pub(crate) fn keep(&mut self, is_measured: impl Fn(Kind) -> bool) {
        self.kinds.retain(|kind| is_measured(*kind));
    }

    /// The median of what was measured of a way.
    pub(crate) fn median(&self, way: usize, kind: Kind) -> f64 {
        median(self.rounds.iter().map(|row| row[way].at(kind)).collect())
    }

    /// The median of the ratio of one way to another in each round.
    pub(crate) fn ratio(&self, way: usize, to: usize, kind: Kind) -> f64 {
        let ratios = self.rounds.iter();
        median(
            ratios
                .map(|row| row[way].at(kind) / row[to].at(kind))
                .collect(),
        )
    }

    fn place(&self, kind: WayKind) -> Option<usize> {
        self.ways.iter().position(|way| *way == kind)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n| {} |", self.what)?;
        for way in &self.ways {
            write!(f, " {} |", way.name())?;
        }
        let udp = self.place(WayKind::Udp);
        let others = [WayKind::Baseline, WayKind::Vxlan];
        let others: Vec<_> = others
            .into_iter()
            .filter_map(|way| Some((way, self.place(way)?)))
            .collect();
        for (other, _) in &others {
            write!(f, " UDP to {} |", other.name())?;
        }
        writeln!(
            f,
            "\n|---|{}",
            "---|".repeat(self.ways.len() + others.len())
        )?;
        for kind in &self.kinds {
            write!(f, "| {} |", kind.name())?;
            for way in 0..self.ways.len() {
                let (digits, value) = kind.show(self.median(way, *kind));
                write!(f, " {value:.digits$} |")?;
            }
            for (_, to) in &others {
                let ratio = udp.map(|udp| self.ratio(udp, *to, *kind));
                match ratio.filter(|ratio| ratio.is_finite()) {
                    Some(ratio) => write!(f, " {ratio:.2} |")?,
                    None => write!(f, " |")?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// What has to be reached by the UDP backend.
struct Goal {
    /// The table's name.
    what: &'static str,
    kind: Kind,
    /// What its ratio to is meant; `None`: the value itself.
    to: Option<WayKind>,
    /// At least, or with `most` at most.
    bound: f64,
    most: bool,
}

/// The goals: one stream and small packets at least, latency, loss and processor time at most.
fn all_goals() -> Vec<Goal> {
    let goal = |what, kind, to, bound, most| Goal {
        what,
        kind,
        to,
        bound,
        most,
    };
    let (base, vxlan) = (Some(WayKind::Baseline), Some(WayKind::Vxlan));
    let mut goals = Vec::new();
    for (what, stream, of_vxlan, four, cpu) in [
        ("super", 10.0, 0.8, 0.4, 1.0 / 9.0),
        ("nic", 7.0, 0.95, 0.7, 1.0 / 6.0),
        ("wire", 4.5, 0.9, 0.8, 1.0 / 4.0),
    ] {
        goals.extend([
            goal(what, Kind::Stream, base, stream, false),
            goal(what, Kind::Stream, vxlan, of_vxlan, false),
            goal(what, Kind::Streams, vxlan, four, false),
            goal(what, Kind::Small, base, 2.0, false),
            goal(what, Kind::Small, vxlan, 1.5, false),
            goal(what, Kind::Flood, None, 5.0, true),
            goal(what, Kind::Median, base, 1.15, true),
            goal(what, Kind::Cpu, base, cpu, true),
            goal(what, Kind::Cpu, vxlan, 1.6, true),
        ]);
    }
    for (what, stream, of_vxlan) in [
        ("one processor per node, super", 8.0, 0.5),
        ("one processor per node, nic", 5.0, 0.7),
        ("one processor per node, wire", 4.0, 0.8),
        ("9,000 bytes, nic", 2.0, 0.6),
        ("9,000 bytes, wire", 2.0, 0.6),
    ] {
        goals.extend([
            goal(what, Kind::Stream, base, stream, false),
            goal(what, Kind::Stream, vxlan, of_vxlan, false),
        ]);
    }
    goals
}

/// Prints the goals of a table with what was reached; how many were missed. What was not measured is
/// left out.
pub(crate) fn goals(table: &Table) -> usize {
    let mut missed = 0;
    let Some(udp) = table.place(WayKind::Udp) else {
        return 0;
    };
    println!();
    let what = table.what.strip_suffix(BBR).unwrap_or(&table.what);
    for goal in all_goals() {
        if goal.what != what {
            continue;
        }
        let (reached, to) = match goal.to {
            None => (table.median(udp, goal.kind), String::new()),
            Some(way) => match table.place(way) {
                Some(to) => (
                    table.ratio(udp, to, goal.kind),
                    format!(", to {}", way.name()),
                ),
                None => continue,
            },
        };
        if reached.is_nan() {
            continue;
        }
        let (sign, good) = if goal.most {
            ("<=", reached <= goal.bound)
        } else {
            (">=", reached >= goal.bound)
        };
        missed += usize::from(!good);
        println!(
            "- {}, {}{to}: {reached:.2}, goal {sign} {:.2}{}",
            table.what,
            goal.kind.name(),
            goal.bound,
            if good { "" } else { ": MISSED" }
        );
    }
    missed
}
