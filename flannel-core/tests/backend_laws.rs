//! The backend suite finds what it is for: a sound backend passes it, and every flaw is caught by
//! the law that names it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use flannel_core::backend::Result;
use flannel_core::reconcile::ownership::nexthop_id;
use flannel_core::{
    Address, Backend, BackendData, BackendType, DualStack, Family, Fdb, IfName, Lease, LeaseAttrs,
    Link, LinkKind, MAIN_TABLE, MacAddr, Neighbour, Network, Nexthop, NodeContext, Object,
    OverlayName, Rejection, Route, RouteProtocol, RouteTarget, Subnet, stable_hash,
};
use flannel_testkit::conformance::backend::{self, Input};

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48",
    "Backend":{"Type":"toy"}}"#;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    MovingAttrs,
    OtherType,
    RefusesAll,
    MovingObjects,
    NoForwardingEntry,
    PeerMakesAddress,
    RouteTooWide,
    OtherFamilies,
    SameTwice,
    Panics,
    PanicsOnPrevious,
    TooLarge,
    Shrinking,
}

static COUNTER: AtomicU32 = AtomicU32::new(1);

/// Another number each time.
fn moving() -> u32 {
    COUNTER.fetch_add(1, Ordering::Relaxed)
}

#[derive(Debug)]
struct Toy(Flaw);

#[derive(Debug)]
struct ToyNetwork {
    flaw: Flaw,
    lease: Lease,
    mtu: u32,
}

fn dev(family: Family) -> IfName {
    IfName::new(format!("toy-{family}")).expect("a name")
}

#[async_trait]
impl Backend for Toy {
    fn backend_type(&self) -> BackendType {
        BackendType::new("toy").expect("a type")
    }

    fn attrs<'a>(&self, cx: &NodeContext<'a>) -> Result<LeaseAttrs> {
        if let Some(previous) = cx.previous
            && self.0 == Flaw::PanicsOnPrevious
        {
            let data = previous.attrs.backend_data.v4.as_ref().expect("data");
            let _mac: MacAddr = data.decode().expect("a MAC");
        }
        let seed = match self.0 {
            Flaw::MovingAttrs => u64::from(moving()) << 32,
            _ => stable_hash(cx.node.as_str().as_bytes()),
        };
        let data = BackendData::encode(&MacAddr::local(seed)).ok();
        Ok(LeaseAttrs {
            public_ip: cx.external.public,
            backend_type: (self.0 != Flaw::OtherType).then(|| self.backend_type()),
            backend_data: DualStack::new(data.clone(), data),
        })
    }

    async fn register_network<'a>(
        &self,
        cx: &NodeContext<'a>,
        lease: Lease,
    ) -> Result<Arc<dyn Network>> {
        let overhead = match self.0 {
            Flaw::TooLarge => 49,
            Flaw::Shrinking if cx.external.mtu > 1500 => cx.external.mtu - 1000,
            _ => 50,
        };
        Ok(Arc::new(ToyNetwork {
            flaw: self.0,
            lease,
            mtu: cx.external.mtu - overhead,
        }))
    }
}

impl ToyNetwork {
    fn path(&self, peer: &Lease, family: Family, subnet: Subnet) -> Result<Vec<Object>, Rejection> {
        if self.flaw == Flaw::RefusesAll {
            return Err(Rejection::NoSubnet);
        }
        let data = peer.attrs.backend_data.get(family);
        if self.flaw == Flaw::Panics {
            data.expect("data");
        }
        let missing = || Rejection::BackendData {
            reason: "missing".to_owned(),
        };
        let mac: MacAddr = data.ok_or_else(missing)?.decode()?;
        if !mac.is_unicast() {
            return Err(missing());
        }
        let dev = dev(family);
        let gateway = subnet.address();
        let remote = peer.attrs.public_ip(family).ok_or_else(missing)?;
        let id = nexthop_id(&OverlayName::default(), gateway, dev, true);
        let protocol = RouteProtocol::UNSPEC;
        let dst = match self.flaw {
            Flaw::RouteTooWide => subnet.supernet(subnet.len() - 1).unwrap_or(subnet),
            _ => subnet,
        };
        let metric = match self.flaw {
            Flaw::MovingObjects => moving(),
            _ => Route::default_metric(family),
        };
        let mut objects = vec![
            Object::Fdb(Fdb { dev, mac, remote }),
            Object::Neighbour(Neighbour {
                dev,
                ip: gateway,
                mac,
            }),
            Object::Nexthop(Nexthop {
                id,
                gateway,
                dev,
                onlink: true,
                protocol,
            }),
            Object::Route(Route {
                table: MAIN_TABLE,
                dst,
                metric,
                target: RouteTarget::Nexthop(id),
                protocol,
                source: None,
            }),
        ];
        match self.flaw {
            Flaw::NoForwardingEntry => drop(objects.remove(0)),
            Flaw::PeerMakesAddress => objects.push(Object::Address(Address {
                dev,
                ip: gateway,
                prefix_len: family.bits(),
            })),
            _ => {}
        }
        Ok(objects)
    }
}

#[async_trait]
impl Network for ToyNetwork {
    fn lease(&self) -> &Lease {
        &self.lease
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn local(&self) -> Vec<Object> {
        let link = |family| {
            Object::Link(Link {
                name: dev(family),
                kind: LinkKind::Bridge,
                mtu: Some(self.mtu),
                mac: None,
                up: true,
                alias: None,
            })
        };
        let mut links: Vec<_> = Family::ALL.into_iter().map(link).collect();
        if self.flaw == Flaw::SameTwice {
            links.push(link(Family::V4));
        }
        links
    }

    fn peer(
        &self,
        peer: &Lease,
        subnets: &DualStack<Subnet>,
    ) -> DualStack<Result<Vec<Object>, Rejection>> {
        let asked = match self.flaw {
            Flaw::OtherFamilies => &peer.subnet,
            _ => subnets,
        };
        asked.map(|family, subnet| self.path(peer, family, *subnet))
    }
}

/// The laws that a toy with a flaw breaks.
async fn broken(flaw: Flaw) -> Vec<&'static str> {
    let backend = Toy(flaw);
    let input = Input::new(&backend, CONFIG, 50).expect("a valid config");
    let outcomes = backend::all(&backend, &input).await;
    assert_eq!(outcomes.len(), 7);
    let broken = outcomes.into_iter().filter(|(_, outcome)| outcome.is_err());
    broken.map(|(law, _)| law).collect()
}

#[tokio::test]
async fn a_sound_backend_keeps_every_law() {
    let backend = Toy(Flaw::None);
    let input = Input::new(&backend, CONFIG, 50).expect("a valid config");
    for (law, outcome) in backend::all(&backend, &input).await {
        outcome.unwrap_or_else(|how| panic!("{law}: {how}"));
    }
}

#[tokio::test]
async fn every_flaw_is_caught_by_its_law() {
    for (flaw, law) in [
        (Flaw::MovingAttrs, "attrs_are_a_pure_function"),
        (Flaw::OtherType, "attrs_are_a_pure_function"),
        (Flaw::OtherType, "peers_accept_what_we_publish"),
        (Flaw::RefusesAll, "peers_accept_what_we_publish"),
        (Flaw::MovingObjects, "network_is_pure"),
        (
            Flaw::NoForwardingEntry,
            "peer_objects_are_closed_under_needs",
        ),
        (Flaw::PeerMakesAddress, "peer_objects_stay_in_bounds"),
        (Flaw::RouteTooWide, "peer_objects_stay_in_bounds"),
        (Flaw::OtherFamilies, "peer_objects_stay_in_bounds"),
        (Flaw::SameTwice, "peer_objects_stay_in_bounds"),
        (Flaw::Panics, "hostile_leases_never_panic"),
        (Flaw::PanicsOnPrevious, "hostile_leases_never_panic"),
        (Flaw::TooLarge, "mtu_leaves_room_for_the_overhead"),
        (Flaw::Shrinking, "mtu_leaves_room_for_the_overhead"),
    ] {
        let broken = broken(flaw).await;
        assert!(
            broken.contains(&law),
            "{flaw:?} breaks {broken:?}, not {law}"
        );
    }
}

/// The verdict of a law on a toy with a flaw.
async fn said(flaw: Flaw, law: &str) -> String {
    let backend = Toy(flaw);
    let input = Input::new(&backend, CONFIG, 50).expect("a valid config");
    let outcomes = backend::all(&backend, &input).await;
    let mut outcomes = outcomes.into_iter().filter(|(name, _)| *name == law);
    let (_, outcome) = outcomes.next().expect("a law");
    outcome.expect_err("it is broken")
}

#[tokio::test]
async fn a_broken_law_tells_the_fields_that_differ_and_no_others() {
    let attrs = said(Flaw::MovingAttrs, "attrs_are_a_pure_function").await;
    let lines: Vec<&str> = attrs.lines().collect();
    assert_eq!(lines.len(), 3, "{attrs}");
    assert_eq!(lines[0], "attrs: the second answer is not the first:");
    assert!(lines[1].starts_with("  backend_data.v4: found "), "{attrs}");
    assert!(lines[2].starts_with("  backend_data.v6: found "), "{attrs}");

    let objects = said(Flaw::MovingObjects, "network_is_pure").await;
    assert_eq!(
        objects.lines().next(),
        Some(
            "what lease4 with subnet.v4: found 10.5.4.0/32, wanted 10.5.4.0/24; \
             subnet.v6: found fd00:5:0:4::/128, wanted fd00:5:0:4::/64 causes: \
             the second answer is not the first:"
        )
    );
    let metrics = objects.lines().skip(1);
    assert!(
        metrics.clone().count() == 2
            && metrics.clone().all(|line| line.contains(".metric: found ")),
        "{objects}"
    );
}

#[tokio::test]
async fn a_broken_law_tells_what_is_odd_about_the_lease_that_broke_it() {
    let panics = said(Flaw::Panics, "hostile_leases_never_panic").await;
    assert!(
        panics.starts_with("peer() panics on lease2 with attrs.backend_data."),
        "{panics}"
    );
    let refused = said(Flaw::RefusesAll, "peers_accept_what_we_publish").await;
    assert_eq!(
        refused,
        format!("nothing leads to 10.5.2.0/24: {}", Rejection::NoSubnet)
    );
    let families = said(Flaw::OtherFamilies, "peer_objects_stay_in_bounds").await;
    assert!(families.contains(", answered for "), "{families}");
    for text in [panics, families] {
        assert!(!text.contains("Lease {"), "a dump: {text}");
    }
}
