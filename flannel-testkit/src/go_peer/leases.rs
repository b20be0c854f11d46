//! The lease watcher of Go flannel (facts 5.2, weaknesses C1 and C2) and its choice of a subnet
//! (facts 3.4, weaknesses A10 and A11).

use flannel_core::{DualStack, NetworkConfig, Pool, Rng, Subnet};

use super::record::{GoLease, GoNet, KeyNets};
use super::vxlan::GoMode;

/// The process ends, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Panic(pub(super) String);

/// What the backend is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    Added(GoLease),
    Removed(GoLease),
}

/// The known leases, and the own one.
#[derive(Debug, Clone)]
pub(super) struct LeaseWatcher {
    own: GoLease,
    known: Vec<GoLease>,
}

impl LeaseWatcher {
    pub(super) const fn new(own: GoLease) -> Self {
        let known = Vec::new();
        Self { own, known }
    }

    /// A lease was written.
    pub(super) fn added(&mut self, lease: GoLease) -> Result<Option<Told>, Panic> {
        if same_subnet(&lease, &self.own)? {
            return Ok(None);
        }
        match self.find(&lease)? {
            Some(at) => self.known[at] = lease.clone(),
            None => self.known.push(lease.clone()),
        }
        Ok(Some(Told::Added(lease)))
    }

    /// A key was deleted. Of a lease that is not known only the subnet is passed on.
    pub(super) fn removed(&mut self, (v4, v6): KeyNets) -> Result<Option<Told>, Panic> {
        let mut gone = self.own.clone();
        (gone.v4, gone.v6, gone.attrs) = (v4, v6, super::GoAttrs::default());
        if same_subnet(&gone, &self.own)? {
            return Ok(None);
        }
        if let Some(at) = self.find(&gone)? {
            gone = self.known.remove(at);
        }
        Ok(Some(Told::Removed(gone)))
    }

    /// A snapshot, or what was taken for one. A lease that is known already is not looked at, and
    /// the own lease becomes a known one.
    pub(super) fn reset(&mut self, snapshot: Vec<GoLease>) -> Result<Vec<Told>, Panic> {
        let mut told = Vec::new();
        let mut left = self.known.clone();
        for lease in &snapshot {
            if same_subnet(lease, &self.own)? {
                continue;
            }
            let mut found = None;
            for (at, known) in left.iter().enumerate() {
                if same_subnet(known, lease)? {
                    found = Some(at);
                    break;
                }
            }
            match found {
                Some(at) => drop(left.remove(at)),
                None => told.push(Told::Added(lease.clone())),
            }
        }
        told.extend(left.into_iter().map(Told::Removed));
        self.known = snapshot;
        Ok(told)
    }

    fn find(&self, lease: &GoLease) -> Result<Option<usize>, Panic> {
        for (at, known) in self.known.iter().enumerate() {
            if same_subnet(known, lease)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }
}

/// Whether two leases are of one subnet. The first one's families decide what is compared, and an
/// IPv6 half that is not there cannot be.
fn same_subnet(decides: &GoLease, other: &GoLease) -> Result<bool, Panic> {
    match (decides.v6, other.v6) {
        _ if decides.v4 != other.v4 => Ok(false),
        (None, _) => Ok(true),
        (Some(one), Some(other)) => Ok(one == other),
        (Some(_), None) => {
            let why = "two leases have one IPv4 subnet, and only one of them an IPv6 subnet";
            Err(Panic(why.to_owned()))
        }
    }
}

/// Whether a lease may be used under a config. Nobody looks at alignment.
pub(super) fn is_compatible(config: &NetworkConfig, lease: &GoLease) -> bool {
    let in_range = |pool: Option<&Pool>, ip: std::net::IpAddr, len| {
        let range = pool.and_then(Pool::range);
        range.is_some_and(|(first, last)| {
            first.len() == len && (first.address()..=last.address()).contains(&ip)
        })
    };
    let (pools, v4) = (config.pools(), &lease.v4);
    in_range(pools.v4.as_ref(), v4.ip.into(), v4.len)
        && match (&pools.v6, &lease.v6) {
            (None, None) => true,
            (Some(pool), Some(v6)) => in_range(Some(pool), v6.ip.into(), v6.len),
            _ => false,
        }
}

/// How many free subnets it looks for before it draws one of them.
const CANDIDATES: usize = 100;

/// Draws a subnet for each family by itself, out of the first that are free.
pub(super) fn allocate(
    mode: GoMode,
    config: &NetworkConfig,
    leases: &[GoLease],
    rng: &mut Rng,
) -> Result<Option<KeyNets>, Panic> {
    let pools = config.pools();
    let v4 = draw(pools.v4.as_ref(), leases, |taken| taken.v4, rng);
    let Some(v4) = v4 else { return Ok(None) };
    let std::net::IpAddr::V4(ip) = v4.address() else {
        return Ok(None);
    };
    let v4 = GoNet { ip, len: v4.len() };
    if mode == GoMode::V4 {
        return Ok(Some((v4, None)));
    }
    if leases.iter().any(|lease| lease.v6.is_none()) {
        let why = "it allocates while a lease without an IPv6 subnet is listed";
        return Err(Panic(why.to_owned()));
    }
    let v6 = draw(pools.v6.as_ref(), leases, |taken| taken.v6, rng);
    let Some(v6) = v6 else { return Ok(None) };
    let std::net::IpAddr::V6(ip) = v6.address() else {
        return Ok(None);
    };
    let v6 = GoNet { ip, len: v6.len() };
    Ok(Some((v4, Some(v6))))
}

fn draw(
    pool: Option<&Pool>,
    leases: &[GoLease],
    half: impl Fn(DualStack<Subnet>) -> Option<Subnet>,
    rng: &mut Rng,
) -> Option<Subnet> {
    let (first, last) = pool?.range()?;
    let taken: Vec<Subnet> = leases.iter().filter_map(|l| half(l.taken())).collect();
    // The real one walks on for as long as it takes.
    let walk = std::iter::successors(Some(first), Subnet::next).take(1 << 16);
    let free: Vec<Subnet> = walk
        .take_while(|subnet| *subnet <= last)
        .filter(|subnet| !taken.iter().any(|taken| taken.overlaps(subnet)))
        .take(CANDIDATES)
        .collect();
    let draw = rng.next_u64() % u64::try_from(free.len().max(1)).ok()?;
    free.get(usize::try_from(draw).ok()?).copied()
}
