//! TUN devices, and packet paths on them where the kernel under test runs some.

use flannel_core::kernel::Error;
use flannel_core::{Family, Link, LinkKind, Object, Op, Tun, TunnelPeer};

use super::Outcome;
use super::fixture::{KernelFixture, ip, link, name};

/// A TUN device of each form is made, found as it is and there already, and removed; one of another
/// alias is spared.
pub async fn a_tun_device_is_made_as_asked(fixture: &KernelFixture) -> Outcome {
    let Some(asked) = fixture.tun() else {
        return Ok(());
    };
    for (multi_queue, vnet_header) in [(true, true), (true, false), (false, true), (false, false)] {
        for up in [false, true] {
            let persistent = true;
            let kind = LinkKind::Tun(Tun {
                persistent,
                multi_queue,
                vnet_header,
                queue: Some(700),
            });
            let link = Link {
                kind,
                up,
                ..asked.clone()
            };
            let object = Object::Link(link.clone());
            fixture.make(std::slice::from_ref(&object)).await?;
            fixture.make(std::slice::from_ref(&object)).await?;
            fixture.expect(std::slice::from_ref(&object)).await?;
            let alias = Some("another's".to_owned());
            let others = Object::Link(Link { alias, ..link });
            fixture.apply(&[Op::Delete(others)]).await?;
            fixture.expect(std::slice::from_ref(&object)).await?;
            fixture.apply(&[Op::Delete(object.clone())]).await?;
            fixture.expect_none(&[object]).await?;
        }
    }
    Ok(())
}

/// Whoever asks for a TUN device of a name that a device has, of the same kind or of another, gets
/// an error, and the device stays what it is.
pub async fn a_tun_device_never_takes_a_name_that_is_taken(fixture: &KernelFixture) -> Outcome {
    let Some(asked) = fixture.tun() else {
        return Ok(());
    };
    let kinds = [
        LinkKind::Bridge,
        LinkKind::Tun(Tun {
            vnet_header: false,
            ..Tun::FOR_TUNNEL
        }),
        LinkKind::Tun(Tun::FOR_TUNNEL),
    ];
    for kind in kinds {
        let theirs = Object::Link(link(asked.name, kind));
        fixture.by_others(Op::Create(theirs.clone())).await?;
        match fixture
            .try_op(Op::Create(Object::Link(asked.clone())))
            .await?
        {
            Err(Error::Exists { .. }) => {}
            result => return Err(format!("over {theirs}: {result:?}")),
        }
        fixture.expect(std::slice::from_ref(&theirs)).await?;
        fixture.by_others(Op::Delete(theirs)).await?;
    }
    Ok(())
}

/// MTU, length of the queue, alias, up and down change in place; what kind of TUN device it is does not, and a hardware
/// address it has not.
pub async fn a_tun_device_changes_in_place(fixture: &KernelFixture) -> Outcome {
    let Some(asked) = fixture.tun() else {
        return Ok(());
    };
    let objects = fixture.tunnel_world();
    fixture.make(&objects).await?;
    let changed = Link {
        mtu: Some(1300),
        alias: Some("flannel:other".to_owned()),
        kind: LinkKind::Tun(Tun {
            queue: Some(300),
            ..Tun::FOR_TUNNEL
        }),
        ..asked.clone()
    };
    fixture
        .apply(&[Op::Change(Object::Link(changed.clone()))])
        .await?;
    fixture.expect(&[Object::Link(changed)]).await?;
    fixture.expect(&objects[1..]).await?;
    let single = LinkKind::Tun(Tun {
        multi_queue: false,
        ..Tun::FOR_TUNNEL
    });
    let single = Link {
        kind: single,
        ..asked.clone()
    };
    match fixture.try_op(Op::Change(Object::Link(single))).await? {
        Err(Error::Unsupported { .. }) => {}
        result => return Err(format!("another kind of TUN device: {result:?}")),
    }
    let mac = Some(flannel_core::MacAddr([0x0e, 0, 0, 0, 0, 1]));
    match fixture
        .try_op(Op::Change(Object::Link(Link { mac, ..asked })))
        .await?
    {
        Err(_) => Ok(()),
        Ok(()) => Err("a TUN device took a hardware address".to_owned()),
    }
}

/// A TUN device gives itself no address: it would send into the overlay from it.
pub async fn a_tun_device_has_no_address_of_its_own(fixture: &KernelFixture) -> Outcome {
    let Some(asked) = fixture.tun() else {
        return Ok(());
    };
    fixture.make(&[Object::Link(asked.clone())]).await?;
    for up in [false, true] {
        let link = Link {
            up,
            ..asked.clone()
        };
        fixture.apply(&[Op::Change(Object::Link(link))]).await?;
    }
    let found = fixture.objects().await?;
    match found
        .values()
        .find(|object| matches!(object, Object::Address(address) if address.dev == asked.name))
    {
        Some(own) => Err(format!("{own}, which nobody asked for")),
        None => Ok(()),
    }
}

/// The packet path's objects, if the kernel under test runs packet paths.
fn tunnels(fixture: &KernelFixture) -> Option<(Link, Vec<Object>)> {
    let objects = fixture.tunnel_world();
    let tun = fixture.tun()?;
    (objects.len() > 1).then_some((tun, objects))
}

/// There is no packet path without a device, nor on one of another kind.
pub async fn a_packet_path_needs_a_tun_device(fixture: &KernelFixture) -> Outcome {
    let Some((tun, _)) = tunnels(fixture) else {
        return Ok(());
    };
    let tunnel = Object::Tunnel(Box::new(fixture.tunnel()));
    match fixture.try_op(Op::Create(tunnel.clone())).await? {
        Err(Error::NoSuchDevice { .. }) => {}
        result => return Err(format!("a packet path without a device: {result:?}")),
    }
    let bridge = Object::Link(link(tun.name, LinkKind::Bridge));
    fixture.make(&[bridge]).await?;
    match fixture.try_op(Op::Create(tunnel.clone())).await? {
        Err(Error::Rejected { .. }) => {}
        result => return Err(format!("a packet path on a bridge: {result:?}")),
    }
    fixture.expect_none(&[tunnel]).await
}

/// Ports, MTU and endpoints change in place, and what is not named stays.
pub async fn a_packet_path_and_its_peers_change_in_place(fixture: &KernelFixture) -> Outcome {
    let Some((_, objects)) = tunnels(fixture) else {
        return Ok(());
    };
    fixture.make(&objects).await?;
    fixture.make(&fixture.tunnel_peers(3)).await?;
    let mut tunnel = fixture.tunnel();
    for family in fixture.families() {
        if let Some(listen) = tunnel.listen.get_mut(family) {
            listen.set_port(8299);
        }
        tunnel.mtu.set(family, Some(1400));
    }
    fixture
        .apply(&[Op::Change(Object::Tunnel(Box::new(tunnel.clone())))])
        .await?;
    fixture.expect(&[Object::Tunnel(Box::new(tunnel))]).await?;
    fixture.expect(&objects[2..]).await?;
    fixture.expect(&fixture.tunnel_peers(3)).await?;
    let mut changed = Vec::new();
    for object in fixture.tunnel_peers(3) {
        if let Object::TunnelPeer(mut peer) = object {
            peer.endpoint.set_port(8299);
            changed.push(Object::TunnelPeer(peer));
        }
    }
    let ops: Vec<_> = changed.iter().cloned().map(Op::Change).collect();
    fixture.apply(&ops).await?;
    fixture.expect(&changed).await?;
    fixture.expect(&objects[2..]).await?;
    // Another endpoint under the key of one that is there.
    for object in fixture.tunnel_peers(3) {
        if let Object::TunnelPeer(_) = object {
            match fixture.try_op(Op::Create(object)).await? {
                Err(Error::Exists { .. }) => {}
                result => return Err(format!("over a peer: {result:?}")),
            }
        }
    }
    Ok(())
}

/// Without its device there is no packet path, and on the next one it can be made again.
pub async fn a_packet_path_goes_with_its_device(fixture: &KernelFixture) -> Outcome {
    let Some((tun, objects)) = tunnels(fixture) else {
        return Ok(());
    };
    for by_others in [true, false] {
        fixture.make(&objects).await?;
        fixture.expect(&objects).await?;
        let delete = Op::Delete(Object::Link(tun.clone()));
        match by_others {
            true => fixture.by_others(delete).await?,
            false => fixture.apply(&[delete]).await?,
        }
        fixture.expect_none(&objects).await?;
    }
    // Deleted and made again before anybody looks.
    fixture.make(&objects).await?;
    for op in [Op::Delete as fn(Object) -> Op, Op::Create] {
        fixture.by_others(op(Object::Link(tun.clone()))).await?;
    }
    fixture.expect_none(&objects[1..]).await?;
    fixture.make(&objects).await?;
    fixture.expect(&objects).await
}

/// A device that is set down takes its routes along, not the packet path.
pub async fn a_packet_path_stays_while_its_device_is_down(fixture: &KernelFixture) -> Outcome {
    let Some((tun, objects)) = tunnels(fixture) else {
        return Ok(());
    };
    fixture.make(&objects).await?;
    let (routes, kept): (Vec<_>, Vec<_>) = objects
        .into_iter()
        .skip(1)
        .partition(|object| matches!(object, Object::Route(_)));
    let down = Link { up: false, ..tun };
    fixture.by_others(Op::Change(Object::Link(down))).await?;
    fixture.expect_none(&routes).await?;
    fixture.expect(&kept).await
}

/// With a packet path go its peers, and nothing else.
pub async fn peers_go_with_their_packet_path(fixture: &KernelFixture) -> Outcome {
    let Some((tun, objects)) = tunnels(fixture) else {
        return Ok(());
    };
    fixture.make(&objects).await?;
    let is_kept = |object: &Object| matches!(object, Object::Link(_) | Object::Route(_));
    let (kept, gone): (Vec<_>, Vec<_>) = objects.into_iter().partition(is_kept);
    let delete = Op::Delete(Object::Tunnel(Box::new(fixture.tunnel())));
    fixture.apply(&[delete.clone(), delete]).await?;
    fixture.expect_none(&gone).await?;
    fixture.expect(&kept).await?;
    // A peer of nothing.
    for object in gone
        .iter()
        .filter(|object| matches!(object, Object::TunnelPeer(_)))
    {
        match fixture.try_op(Op::Create(object.clone())).await? {
            Err(Error::NotFound { .. }) => {}
            result => {
                return Err(format!(
                    "{object} on {} without a path: {result:?}",
                    tun.name
                ));
            }
        }
        fixture.apply(&[Op::Delete(object.clone())]).await?;
    }
    Ok(())
}

/// What cannot work is refused, and nothing of it stays.
pub async fn what_no_packet_path_can_be_is_rejected(fixture: &KernelFixture) -> Outcome {
    let Some((tun, _)) = tunnels(fixture) else {
        return Ok(());
    };
    fixture.make(&[Object::Link(tun.clone())]).await?;
    let good = fixture.tunnel();
    let mut bad = vec![good.clone(), good.clone(), good.clone()];
    bad[0].listen = flannel_core::DualStack::default();
    bad[1].mtu = flannel_core::DualStack::default();
    if let Some(listen) = &mut bad[2].listen.v4 {
        listen.set_port(0);
    }
    for tunnel in bad {
        let tunnel = Object::Tunnel(Box::new(tunnel));
        match fixture.try_op(Op::Create(tunnel.clone())).await? {
            Err(Error::Rejected { .. }) => fixture.expect_none(&[tunnel]).await?,
            result => return Err(format!("{tunnel}: {result:?}")),
        }
    }
    fixture.make(&[Object::Tunnel(Box::new(good))]).await?;
    for object in fixture.tunnel_peers(2) {
        let Object::TunnelPeer(peer) = object else {
            continue;
        };
        let other = match peer.subnet.family() {
            Family::V4 => "2001:db8::9",
            Family::V6 => "192.0.2.9",
        };
        for (ip, port) in [(ip(other), 8285), (peer.endpoint.ip(), 0)] {
            let endpoint = std::net::SocketAddr::new(ip, port);
            let peer = Object::TunnelPeer(TunnelPeer {
                endpoint,
                ..peer.clone()
            });
            match fixture.try_op(Op::Create(peer.clone())).await? {
                Err(Error::Rejected { .. }) => fixture.expect_none(&[peer]).await?,
                result => return Err(format!("{peer}: {result:?}")),
            }
        }
    }
    Ok(())
}

/// Of a batch with a packet path that fails, the peers and their routes are not tried, in the place
/// of each other; all else is done.
pub async fn what_needs_a_failed_packet_path_is_skipped(fixture: &KernelFixture) -> Outcome {
    let Some((tun, objects)) = tunnels(fixture) else {
        return Ok(());
    };
    let mut broken = fixture.tunnel();
    broken.mtu = flannel_core::DualStack::default();
    let bystander = Object::Link(link(name("fl.br"), LinkKind::Bridge));
    let mut ops = vec![
        Op::Create(Object::Link(tun)),
        Op::Create(Object::Tunnel(Box::new(broken))),
    ];
    ops.extend(objects[2..].iter().cloned().map(Op::Create));
    ops.push(Op::Create(bystander.clone()));
    let results = fixture.kernel.apply(&ops).await;
    if results.len() != ops.len() {
        return Err(format!("{} results for {} ops", results.len(), ops.len()));
    }
    for (at, (op, result)) in ops.iter().zip(&results).enumerate() {
        let fits = match (at, result) {
            (0, Ok(())) | (1, Err(Error::Rejected { .. })) => true,
            (0 | 1, _) => false,
            _ if at + 1 == ops.len() => result.is_ok(),
            (_, Err(Error::Skipped { key })) => *key == ops[1].key(),
            _ => false,
        };
        if !fits {
            return Err(format!("{} {}: {result:?}", op.verb(), op.object()));
        }
    }
    fixture.expect(&[bystander]).await?;
    fixture.expect_none(&objects[1..]).await
}
