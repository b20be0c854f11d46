//! What becomes of devices and what is on them, beside what going down does.

use std::net::IpAddr;

use flannel_core::kernel::Error;
use flannel_core::{
    Family, IfName, Link, LinkKind, MAIN_TABLE, MacAddr, Object, ObjectKey, Objects, Op, Route,
    RouteProtocol, RouteTarget, Subnet,
};

use super::Outcome;
use super::fixture::{KernelFixture, address, link, name, route};

/// The device of another underlay, with an address of its own.
const OTHER: &str = "br-other";

/// A change of what is gone makes it, on a device that is there.
pub async fn change_makes_what_is_gone(fixture: &KernelFixture) -> Outcome {
    let objects = fixture.world();
    for object in &objects {
        let op = match object {
            Object::Link(_) => Op::Create(object.clone()),
            _ => Op::Change(object.clone()),
        };
        fixture.apply(&[op]).await?;
    }
    fixture.expect(&objects).await
}

/// A VXLAN device moves to another underlay in place: what is on it stays, it no longer goes with
/// the old one, and goes with the new one.
pub async fn an_underlay_changes_in_place(fixture: &KernelFixture) -> Outcome {
    let mut objects = fixture.world();
    fixture.make(&objects).await?;
    let other = name(OTHER);
    fixture
        .make(&[
            Object::Link(Link {
                mtu: Some(1500),
                ..link(other, LinkKind::Bridge)
            }),
            address(other, "198.51.100.1", 24),
        ])
        .await?;
    for object in &mut objects {
        let Object::Link(link) = object else { continue };
        let LinkKind::Vxlan(vxlan) = &mut link.kind else {
            continue;
        };
        vxlan.underlay = Some(other);
        let change = Op::Change(object.clone());
        fixture.apply(&[change]).await?;
    }
    fixture.expect(&objects).await?;
    for (dev, stay) in [(fixture.underlay, true), (other, false)] {
        let found = fixture.objects().await?;
        let underlay = found.get(&ObjectKey::Link(dev)).ok_or("no underlay")?;
        fixture.apply(&[Op::Delete(underlay.clone())]).await?;
        match stay {
            true => fixture.expect(&objects).await?,
            false => fixture.expect_none(&objects).await?,
        }
    }
    Ok(())
}

/// A VXLAN device that was bound to an underlay stays bound to one.
pub async fn an_underlay_is_not_taken_away(fixture: &KernelFixture) -> Outcome {
    let device = fixture.vxlan(Family::V4);
    fixture.make(std::slice::from_ref(&device)).await?;
    let mut free = device.clone();
    if let Object::Link(Link {
        kind: LinkKind::Vxlan(vxlan),
        ..
    }) = &mut free
    {
        vxlan.underlay = None;
    }
    match fixture.try_op(Op::Change(free)).await? {
        Err(Error::Unsupported { .. }) => fixture.expect(&[device]).await,
        result => Err(format!("an underlay taken away: {result:?}")),
    }
}

/// VXLAN devices of one port and family are received by one socket, so those that are up at a time
/// must agree on group policy.
pub async fn devices_of_one_port_agree_on_group_policy(fixture: &KernelFixture) -> Outcome {
    for family in fixture.families() {
        let first = fixture.vxlan(family);
        fixture.make(std::slice::from_ref(&first)).await?;
        let Object::Link(asked) = first else { continue };
        let second = |up| {
            let mut link = asked.clone();
            link.name = name("fl.policy");
            link.up = up;
            if let LinkKind::Vxlan(vxlan) = &mut link.kind {
                vxlan.vni += 1;
                vxlan.gbp = true;
            }
            Object::Link(link)
        };
        match fixture.try_op(Op::Create(second(true))).await? {
            Err(Error::InUse { by, .. }) if by.contains(asked.name.as_str()) => {
                fixture.expect_none(&[second(true)]).await?;
            }
            result => return Err(format!("a device of another policy: {result:?}")),
        }
        fixture.make(&[second(false)]).await?;
        match fixture.try_op(Op::Change(second(true))).await? {
            Err(Error::InUse { .. }) => {}
            result => return Err(format!("another policy, set up: {result:?}")),
        }
        fixture.expect(&[second(false)]).await?;
        fixture.apply(&[Op::Delete(second(false))]).await?;
    }
    Ok(())
}

/// One end of a veth pair takes the other along.
pub async fn a_veth_pair_goes_as_one(fixture: &KernelFixture) -> Outcome {
    let (one, two) = (name("fl.v1"), name("fl.v2"));
    let end = |of, peer| {
        Object::Link(Link {
            up: false,
            ..link(of, LinkKind::Veth { peer: Some(peer) })
        })
    };
    fixture.make(&[end(one, two)]).await?;
    fixture.expect(&[end(one, two), end(two, one)]).await?;
    fixture.apply(&[Op::Delete(end(two, one))]).await?;
    fixture.expect_none(&[end(one, two), end(two, one)]).await
}

/// A VXLAN device gives itself no address: nobody would use it.
pub async fn a_vxlan_device_has_no_address_of_its_own(fixture: &KernelFixture) -> Outcome {
    for family in fixture.families() {
        let Object::Link(link) = fixture.vxlan(family) else {
            continue;
        };
        fixture.make(&[Object::Link(link.clone())]).await?;
        for up in [false, true] {
            let link = Link { up, ..link.clone() };
            fixture.apply(&[Op::Change(Object::Link(link))]).await?;
        }
        let found = fixture.objects().await?;
        let own = found
            .values()
            .find(|object| matches!(object, Object::Address(address) if address.dev == link.name));
        if let Some(own) = own {
            return Err(format!("{own}, which nobody asked for"));
        }
    }
    Ok(())
}

/// An address brings the route of its network, which goes with the last address of the network and
/// with the device's being up; a single IPv4 address has none.
pub async fn an_address_brings_its_network(fixture: &KernelFixture) -> Outcome {
    let dev = KernelFixture::overlay(Family::V4);
    fixture.make(&[fixture.vxlan(Family::V4)]).await?;
    let mut addresses = vec![
        (address(dev, "10.81.0.1", 24), Some("10.81.0.0/24")),
        (address(dev, "10.82.0.1", 32), None),
    ];
    if fixture.features.ipv6 {
        addresses.push((address(dev, "fd81::1", 64), Some("fd81::/64")));
        addresses.push((address(dev, "fd82::1", 128), Some("fd82::1/128")));
    }
    for (object, network) in &addresses {
        let before = routes(&fixture.objects().await?);
        fixture.make(std::slice::from_ref(object)).await?;
        let mut expected = before.clone();
        if let Some(network) = network {
            expected.push(connected(network, dev));
            expected.sort_by_key(|route| Object::Route(route.clone()).key());
        }
        let found = routes(&fixture.objects().await?);
        if found != expected {
            return Err(format!("with {object} the routes are {found:?}"));
        }
        fixture.apply(&[Op::Delete(object.clone())]).await?;
        let found = routes(&fixture.objects().await?);
        if found != before {
            return Err(format!("without {object} the routes are {found:?}"));
        }
    }
    if fixture.features.ipv6 {
        // The second address of a network keeps its route.
        let (first, second) = (address(dev, "fd81::1", 64), address(dev, "fd81::2", 64));
        let network = Object::Route(connected("fd81::/64", dev));
        fixture.make(&[first.clone(), second.clone()]).await?;
        fixture.apply(&[Op::Delete(first)]).await?;
        fixture.expect(std::slice::from_ref(&network)).await?;
        fixture.apply(&[Op::Delete(second)]).await?;
        fixture.expect_none(&[network]).await?;
    }
    let object = address(dev, "10.81.0.1", 24);
    fixture.make(std::slice::from_ref(&object)).await?;
    let network = Object::Route(connected("10.81.0.0/24", dev));
    let Object::Link(link) = fixture.vxlan(Family::V4) else {
        return Ok(());
    };
    let hole = route("10.83.0.0/16", RouteTarget::Blackhole);
    fixture.make(std::slice::from_ref(&hole)).await?;
    for (up, there) in [(false, false), (true, true)] {
        let link = Link { up, ..link.clone() };
        fixture.apply(&[Op::Change(Object::Link(link))]).await?;
        match there {
            true => fixture.expect(std::slice::from_ref(&network)).await?,
            false => fixture.expect_none(std::slice::from_ref(&network)).await?,
        }
        fixture.expect(&[object.clone(), hole.clone()]).await?;
    }
    Ok(())
}

/// The route that the kernel makes for a network.
fn connected(network: &str, dev: IfName) -> Route {
    let dst: Subnet = network
        .parse()
        .expect("the networks of this suite are subnets");
    Route {
        table: MAIN_TABLE,
        dst,
        metric: if dst.family() == Family::V6 { 256 } else { 0 },
        target: RouteTarget::Device(dev),
        protocol: RouteProtocol::KERNEL,
        // The address is the first of its network in this suite.
        source: dst.nth(1).filter(IpAddr::is_ipv4),
    }
}

/// The routes less those to IPv6 link-local networks, of which every device has one.
fn routes(objects: &Objects) -> Vec<Route> {
    objects
        .values()
        .filter_map(|object| match object {
            Object::Route(route) => Some(route.clone()),
            _ => None,
        })
        .filter(|route| {
            !matches!(route.dst.address(), IpAddr::V6(ip) if ip.is_unicast_link_local() || ip.is_multicast())
        })
        .collect()
}

/// A device without its last IPv6 address keeps its IPv6 neighbours, nexthops and routes.
pub async fn the_last_ipv6_address_goes_alone(fixture: &KernelFixture) -> Outcome {
    if !fixture.features.ipv6 {
        return Ok(());
    }
    let objects = fixture.world();
    fixture.make(&objects).await?;
    let (gone, kept): (Vec<_>, Vec<_>) = objects
        .into_iter()
        .partition(|object| matches!(object, Object::Address(a) if a.ip.is_ipv6()));
    let deletes: Vec<_> = gone.iter().cloned().map(Op::Delete).collect();
    fixture.apply(&deletes).await?;
    fixture.expect_none(&gone).await?;
    fixture.expect(&kept).await
}

/// What a device was not asked for it keeps, whatever else is changed.
pub async fn a_change_leaves_what_it_does_not_name(fixture: &KernelFixture) -> Outcome {
    let Object::Link(asked) = fixture.vxlan(Family::V4) else {
        return Ok(());
    };
    fixture.make(&[Object::Link(asked.clone())]).await?;
    let changes = [
        Link {
            mtu: None,
            mac: None,
            alias: None,
            up: false,
            ..asked.clone()
        },
        Link {
            mtu: Some(1300),
            mac: None,
            alias: None,
            ..asked.clone()
        },
        Link {
            mtu: None,
            mac: Some(MacAddr([0x0e, 0, 0, 0, 0, 7])),
            alias: None,
            ..asked.clone()
        },
    ];
    let mut expected = asked;
    for change in changes {
        expected.mtu = change.mtu.or(expected.mtu);
        expected.mac = change.mac.or(expected.mac);
        expected.alias = change.alias.clone().or(expected.alias);
        expected.up = change.up;
        fixture.apply(&[Op::Change(Object::Link(change))]).await?;
        fixture.expect(&[Object::Link(expected.clone())]).await?;
    }
    Ok(())
}
