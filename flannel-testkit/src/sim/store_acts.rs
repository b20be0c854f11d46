//! What happens in the store: what others write there, honest or not.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use flannel_core::{
    BackendType, DualStack, Family, InstanceId, Lease, LeaseAttrs, LeaseKey, NetworkConfig, NodeId,
    PublicIp, Revision, Subnet,
};

use super::action::{Debris, Hostile, StoreAction};
use super::cluster::Tamper;
use super::hardware::addresses;
use super::world::World;

/// How long records of others last that are not renewed.
const STRANGERS: Duration = Duration::from_secs(90);

impl World {
    pub(super) fn act_on_store(&mut self, action: StoreAction) -> bool {
        match action {
            StoreAction::Put(hostile, of, n) => self.put_hostile(hostile, of, n),
            StoreAction::Take(node) => match self.record_of(node % self.nodes.len()) {
                Some(record) => {
                    let thief = self.stranger(0x77, record.subnet);
                    let record = Lease {
                        key: record.key,
                        ttl: record.ttl,
                        ..thief
                    };
                    self.write(record)
                }
                None => false,
            },
            StoreAction::RemoveOf(node) => match self.record_of(node % self.nodes.len()) {
                Some(record) => self.tamper(Tamper::Remove(record.key)),
                None => false,
            },
            StoreAction::Remove(n) => {
                let records = self.cluster.truth().leases;
                let nth = usize::from(n).checked_rem(records.len());
                nth.is_some_and(|nth| self.tamper(Tamper::Remove(records[nth].key.clone())))
            }
            StoreAction::Garble(node) => match self.record_of(node % self.nodes.len()) {
                Some(record) => self.tamper(Tamper::Garble(record.key)),
                None => false,
            },
            StoreAction::Junk(n) => {
                let key = LeaseKey::new(format!("junk-{n}"));
                self.tamper(Tamper::Garble(key))
            }
            StoreAction::Debris(debris, of, n) => self.put_debris(debris, of, n),
            StoreAction::Config(n) => {
                let config = self.setup.configs[n % self.setup.configs.len()].clone();
                if config == self.config
                    || !self.may_change_to(&config)
                    || !self.tamper(Tamper::Config(config.clone()))
                {
                    return false;
                }
                self.judge.config(&config);
                self.config = config;
                true
            }
            StoreAction::Empty { all } => {
                let truth = self.cluster.truth();
                let leases = truth.leases.into_iter().map(|lease| lease.key);
                let unreadable = truth.unreadable.into_iter().map(|record| record.key);
                let keys: Vec<LeaseKey> = leases.chain(unreadable).collect();
                if all && !self.tamper(Tamper::NoConfig) {
                    return false;
                }
                let mut removed = all;
                for key in keys {
                    removed |= self.tamper(Tamper::Remove(key));
                }
                removed
            }
            StoreAction::BadConfig => self.tamper(Tamper::BadConfig),
            StoreAction::Backup => {
                let done = self.tamper(Tamper::Backup);
                self.backup = done.then(|| self.config.clone());
                done
            }
            StoreAction::Restore => {
                let Some(config) = self.backup.clone() else {
                    return false;
                };
                if !self.tamper(Tamper::Restore) {
                    return false;
                }
                self.judge.config(&config);
                self.config = config;
                true
            }
            StoreAction::Compact => self.tamper(Tamper::Compact),
            StoreAction::Reserve(node) => {
                let node = node % self.nodes.len();
                match self.record_of(node) {
                    Some(record) => self.tamper(Tamper::Reserve(record.node, record.subnet)),
                    None => false,
                }
            }
            StoreAction::Unreserve(node) => {
                let ends =
                    |record: Lease| self.tamper(Tamper::Unreserve(record.node, record.subnet));
                self.nodes_from(node)
                    .any(|at| self.record_of(at).is_some_and(ends))
            }
        }
    }

    /// Whether the store can keep a network of this config, and Go peers survive it: these know
    /// their families from the config that was there when they began.
    fn may_change_to(&self, config: &NetworkConfig) -> bool {
        let same = config.pools().same_families(self.config.pools());
        self.cluster.supports(config) && (same || self.gos.is_empty())
    }

    fn write(&mut self, record: Lease) -> bool {
        let key = record.key.clone();
        let done = self.tamper(Tamper::Put(record));
        if done {
            self.written.insert(key);
        }
        done
    }

    /// A record as an honest node of another program would write it.
    fn stranger(&self, n: u8, subnet: DualStack<Subnet>) -> Lease {
        let number = 0x9000 + u64::from(n);
        let model = &self.setup.model;
        let data = |_| model.data(&self.config, number);
        let mut backend_data = DualStack::default();
        for family in subnet.families() {
            backend_data.set(family, data(family));
        }
        Lease {
            key: LeaseKey::new(""),
            node: NodeId::new(format!("stranger-{n}")).expect("a node id"),
            instance: None,
            subnet,
            attrs: LeaseAttrs {
                public_ip: addresses(100 + n % 90, 0),
                backend_type: Some(model.backend_type(&self.config)),
                backend_data,
            },
            ttl: (n.is_multiple_of(2)).then_some(STRANGERS),
            created: Revision(0),
            revision: Revision(0),
        }
    }

    /// Subnets far from where nodes get theirs.
    fn spare(&self, n: u8) -> Option<DualStack<Subnet>> {
        let mut spare = DualStack::default();
        for (family, pool) in self.config.pools().iter() {
            let (_, last) = pool.range()?;
            let network = pool.network();
            let back = usize::from(n % 4);
            let all: Vec<Subnet> = network.subnets(last.len()).take(256).collect();
            spare.set(family, all.iter().rev().nth(back).copied());
        }
        Some(spare)
    }

    fn put_hostile(&mut self, hostile: Hostile, of: usize, n: u8) -> bool {
        let own = self.record_of(of % self.nodes.len());
        let Some(spare) = self.spare(n) else {
            return false;
        };
        let mut record = self.stranger(n, spare);
        if self.spoil(&mut record, hostile, own.as_ref(), n).is_none() {
            return false;
        }
        let Some(key) = self.cluster.record_key(&record.subnet) else {
            return false;
        };
        record.key = key;
        // Nobody's record is written over by accident.
        let records = self.cluster.truth();
        let taken = records
            .leases
            .iter()
            .any(|lease| lease.key == record.key && lease.node != record.node);
        // Go flannel writes its record anew to renew it: two changes of one record, one after the other.
        let twice = n % 4 == 3;
        !taken && self.write(record.clone()) && (!twice || self.write(record))
    }

    fn put_debris(&mut self, debris: Debris, of: usize, n: u8) -> bool {
        let half = |subnet: &Subnet| subnet.subnets(subnet.len() + 1).nth(usize::from(n % 2));
        let name = |subnet: &Subnet| format!("{}-{}", subnet.address(), subnet.len());
        let own = || self.record_of(of % self.nodes.len())?.subnet.v4;
        let (name, value) = match debris {
            Debris::InOwn => match own().as_ref().and_then(half) {
                Some(part) => (name(&part), b"{}".to_vec()),
                None => return false,
            },
            Debris::Half => match self
                .config
                .pools()
                .v4
                .and_then(|pool| half(&pool.network()))
            {
                Some(part) => (name(&part), b"{}".to_vec()),
                None => return false,
            },
            // Whoever runs Go flannel in a network of IPv4 is crashed by it.
            Debris::OtherStack => match own() {
                Some(own) if self.gos.is_empty() => (
                    format!("{}&fd00:99:0:{n:x}::-64", name(&own)),
                    br#"{"PublicIP":"192.0.2.190","PublicIPv6":"2001:db8::be"}"#.to_vec(),
                ),
                _ => return false,
            },
            Debris::Lan => return self.put_hostile(Hostile::Lan, of, n),
            Debris::Huge => (format!("huge-{}", n % 8), vec![b'x'; 40 * 1024]),
        };
        let key = LeaseKey::new(&name);
        let done = self.tamper(Tamper::Raw(name, value));
        if done {
            self.written.insert(key);
        }
        done
    }

    /// Makes an honest record what is asked for; `None` if that cannot be.
    fn spoil(
        &self,
        record: &mut Lease,
        hostile: Hostile,
        own: Option<&Lease>,
        n: u8,
    ) -> Option<()> {
        let subnets = |v4: &str, v6: &str| {
            let v4: Subnet = v4.parse().ok()?;
            let v6: Subnet = v6.parse().ok()?;
            let mut both = DualStack::both(v4, v6);
            for family in Family::ALL {
                if !self.config.pools().has(family) {
                    both.set(family, None);
                }
            }
            Some(both)
        };
        match hostile {
            Hostile::Honest => {}
            Hostile::OtherFamily => {
                let has_v4 = self.config.pools().has(Family::V4);
                let v6: Subnet = format!("fd00:42:0:{n:x}::/64").parse().ok()?;
                let v4: Subnet = format!("10.42.{}.0/24", n % 16).parse().ok()?;
                record.subnet = if has_v4 {
                    DualStack::v6(v6)
                } else {
                    DualStack::v4(v4)
                };
            }
            Hostile::OwnSubnet => {
                // Of a node with both families only one, else the key were the node's own.
                let own = own?;
                let first = own.subnet.families().next()?;
                record.subnet.set(first, own.subnet.get(first).copied());
            }
            Hostile::InsideOwn => {
                record.subnet = own?.subnet.map(|_, own| {
                    let len = own.len() + 2;
                    own.subnets(len).nth(usize::from(n % 4)).unwrap_or(*own)
                });
            }
            Hostile::AroundOwn => {
                record.subnet = own?
                    .subnet
                    .map(|_, own| own.supernet(own.len() - 1).unwrap_or(*own));
            }
            Hostile::OutsidePool => {
                record.subnet = subnets(&format!("10.77.{n}.0/24"), "fd00:77::/64")?;
            }
            Hostile::DefaultRoute => record.subnet = subnets("0.0.0.0/0", "::/0")?,
            Hostile::Multicast => record.subnet = subnets("224.0.0.0/24", "ff02::/64")?,
            Hostile::WholePool => {
                record.subnet = self.config.pools().map(|_, pool| pool.network());
            }
            Hostile::Underlay => record.subnet = subnets("192.0.2.0/24", "2001:db8::/64")?,
            Hostile::Lan => {
                let pool = self.config.pools().v4?.network();
                let parts = [
                    "10.42.0.0/25",
                    "10.42.0.64/26",
                    "10.42.0.0/24",
                    "10.42.0.0/28",
                ];
                let part: Subnet = parts[usize::from(n % 4)].parse().ok()?;
                if !pool.contains(&part) {
                    return None;
                }
                record.subnet.v4 = Some(part);
                if record.subnet.v6.is_some() {
                    record.subnet.v6 = Some("fd00:42::/66".parse().ok()?);
                }
            }
            Hostile::DuplicateMac => record.attrs.backend_data = own?.attrs.backend_data.clone(),
            Hostile::OwnPublicIp => record.attrs.public_ip = own?.attrs.public_ip,
            Hostile::BadPublicIp => {
                let (v4, v6): (Ipv4Addr, Ipv6Addr) = match n % 7 {
                    0 => (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED),
                    1 => (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
                    2 => (Ipv4Addr::new(224, 0, 0, 1), "ff02::1".parse().ok()?),
                    3 => (Ipv4Addr::new(169, 254, 7, 7), "fe80::7".parse().ok()?),
                    // The broadcast address of everybody's link, and an address that each node has.
                    4 => (Ipv4Addr::new(192, 0, 2, 255), "2001:db8::99".parse().ok()?),
                    5 => (Ipv4Addr::new(10, 99, 0, 1), "2001:db8::99".parse().ok()?),
                    _ => (Ipv4Addr::BROADCAST, "fe80::1".parse().ok()?),
                };
                record.attrs.public_ip = PublicIp::both(v4, v6);
            }
            Hostile::InnerPublicIp => {
                let mut inner = PublicIp::default();
                for pool in self.config.pools().values() {
                    inner.set_ip(pool.network().nth(9)?);
                }
                record.attrs.public_ip = inner;
            }
            Hostile::NoPublicIp => record.attrs.public_ip = PublicIp::default(),
            Hostile::OtherBackend => {
                record.attrs.backend_type = match n % 2 {
                    0 => Some(BackendType::host_gw()),
                    _ => None,
                };
            }
            Hostile::NoData => record.attrs.backend_data = DualStack::default(),
            Hostile::MulticastMac => self.wrong(record, 4)?,
            Hostile::MalformedData => self.wrong(record, u64::from(n % 4))?,
            Hostile::HugeData => self.wrong(record, 8)?,
            Hostile::OtherVni => self.wrong(record, 6)?,
            Hostile::Clone => {
                let own = own?;
                record.attrs = own.attrs.clone();
                record.instance = match n % 3 {
                    0 => None,
                    1 => Some(InstanceId::from_bits(u128::from(n))),
                    _ => own.instance,
                };
            }
        }
        Some(())
    }

    fn wrong(&self, record: &mut Lease, number: u64) -> Option<()> {
        let data = self.setup.model.wrong_data(&self.config, number)?;
        for family in record.subnet.families() {
            record.attrs.backend_data.set(family, Some(data.clone()));
        }
        Some(())
    }
}
