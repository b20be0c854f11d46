//! A kernel is right in what it says of packets
//! ([`Kernel::host_facts`](flannel_core::Kernel::host_facts)). One that says nothing keeps these
//! promises.

use flannel_core::{
    Change, Family, Lookup, MAIN_TABLE, Object, Op, Questions, Refused, Route, RouteTarget, Routed,
    Sysctl,
};

use super::Outcome;
use super::contract::{drain, next_fitting};
use super::fixture::{KernelFixture, route, text};

/// A packet takes the route that is there, whichever form that has.
pub async fn a_lookup_answers_the_route(fixture: &KernelFixture) -> Outcome {
    fixture.make(&fixture.world()).await?;
    for family in fixture.families() {
        let dev = KernelFixture::overlay(family);
        let mut gateway = None;
        for object in fixture.path(family, 2) {
            gateway = match &object {
                Object::Neighbour(neighbour) => Some(neighbour.ip),
                _ => gateway,
            };
            let Object::Route(Route { dst, .. }) = object else {
                continue;
            };
            let inside = dst.nth(7).ok_or("the subnet is too small")?;
            let way = Routed::Through {
                dev,
                gateway,
                table: MAIN_TABLE,
            };
            answers(fixture, Lookup::to(inside, None), &way).await?;
        }
        // An IPv6 address is this host's only when nobody else has turned out to have it.
        if let (Family::V4, Some(Object::Address(own))) = (family, fixture.path(family, 2).first())
        {
            answers(fixture, Lookup::to(own.ip, None), &Routed::Local).await?;
        }
    }
    Ok(())
}

/// A packet to a black hole goes nowhere, also if a wider route leads somewhere.
pub async fn a_lookup_tells_a_black_hole(fixture: &KernelFixture) -> Outcome {
    fixture.make(&fixture.world()).await?;
    for (family, dst) in [
        (Family::V4, "10.78.2.128/25"),
        (Family::V6, "fd78:2::8000:0/112"),
    ] {
        if family == Family::V6 && !fixture.features.ipv6 {
            continue;
        }
        let hole = route(dst, RouteTarget::Blackhole);
        let Object::Route(Route { dst, .. }) = hole else {
            continue;
        };
        let inside = Lookup::to(dst.nth(1).ok_or("the subnet is too small")?, None);
        fixture.by_others(Op::Create(hole)).await?;
        let dropped = Routed::Refused(Refused::Dropped);
        answers(fixture, inside, &dropped).await?;
    }
    Ok(())
}

/// The kernel tells if IPv4 packets that come in on a device are forwarded, and it hints at a
/// change of that.
pub async fn forwarding_that_is_off_is_told(fixture: &KernelFixture) -> Outcome {
    if !fixture.features.sysctls {
        return Ok(());
    }
    let dev = fixture.underlay;
    let mut questions = Questions::default();
    questions.families.insert(Family::V4);
    questions.devices.insert(dev);
    let mut told = fixture.kernel.changes();
    for on in [false, true, false] {
        drain(&mut told).await;
        let setting = Object::Sysctl(Sysctl {
            dev,
            family: Family::V4,
            name: "forwarding".to_owned(),
            value: u8::from(on).to_string(),
        });
        let facts = fixture.kernel.host_facts(&questions).await.map_err(text)?;
        let before = facts.setting(Family::V4, Some(dev)).forwarding;
        fixture.by_others(Op::Change(setting)).await?;
        let facts = fixture.kernel.host_facts(&questions).await.map_err(text)?;
        let is = facts.setting(Family::V4, Some(dev)).forwarding;
        if is.is_some_and(|is| is != on) {
            return Err(format!("forwarding is {on}, and told {is:?}"));
        }
        let fits = |change: &Change| matches!(change, Change::Policy | Change::All);
        if is != before && next_fitting(&mut told, fits).await.is_none() {
            return Err(format!("nothing told of forwarding that became {on}"));
        }
    }
    Ok(())
}

async fn answers(fixture: &KernelFixture, lookup: Lookup, expected: &Routed) -> Outcome {
    let mut questions = Questions::default();
    questions.lookups.push(lookup);
    let facts = fixture.kernel.host_facts(&questions).await.map_err(text)?;
    match facts.routed.first() {
        Some(Some(found)) if found != expected => {
            Err(format!("{lookup:?}: {found:?}, and should be {expected:?}"))
        }
        _ => Ok(()),
    }
}
