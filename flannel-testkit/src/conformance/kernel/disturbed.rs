//! What holds while others change things, and when something goes wrong in the middle.

use std::collections::BTreeSet;

use flannel_core::kernel::Error;
use flannel_core::{Change, Family, Fdb, Link, MacAddr, Object, ObjectKey, Op, Scope, Sysctl};

use super::Outcome;
use super::contract::{drain, next_fitting};
use super::fixture::{KernelFixture, address, all_ok, ip, name, same, text};

/// What needs a failed op is not tried, and the reason given is the first failure; all else is
/// tried. An op that makes good what failed ends that.
pub async fn what_needs_a_failed_op_is_skipped(fixture: &KernelFixture) -> Outcome {
    fixture.make(&[fixture.vxlan(Family::V4)]).await?;
    let own = fixture.path(Family::V4, 2).remove(0);
    fixture.make(&[own]).await?;
    let (good, mut bad): (Vec<_>, Vec<_>) = (
        fixture.path(Family::V4, 3).split_off(1),
        fixture.path(Family::V4, 2).split_off(1),
    );
    let right = bad.first().cloned().ok_or("a path without objects")?;
    if let Some(Object::Fdb(fdb)) = bad.first_mut() {
        // Of another family than its device's.
        fdb.remote = ip("2001:db8::9");
    }
    let first = bad.first().map(Object::key).ok_or("an empty path")?;
    let by_peer: Vec<_> = bad.iter().chain(&good).cloned().collect();
    let mut by_kind = by_peer.clone();
    by_kind.sort_by_key(Object::key);
    for objects in [by_peer, by_kind] {
        let ops: Vec<_> = objects.iter().cloned().map(Op::Create).collect();
        let results = fixture.kernel.apply(&ops).await;
        for (object, result) in objects.iter().zip(&results) {
            let fits = match result {
                Ok(()) => good.contains(object),
                Err(Error::Unsupported { .. }) => object.key() == first,
                Err(Error::Skipped { key }) => {
                    *key == first && bad.contains(object) && object.key() != first
                }
                Err(_) => false,
            };
            if !fits {
                return Err(format!("create {object}: {result:?}"));
            }
        }
        fixture.expect_none(&bad).await?;
        let deletes: Vec<_> = good.iter().rev().cloned().map(Op::Delete).collect();
        fixture.apply(&deletes).await?;
    }
    let mut ops = vec![Op::Create(bad.remove(0)), Op::Create(right.clone())];
    ops.extend(bad.iter().cloned().map(Op::Create));
    let results = fixture.kernel.apply(&ops).await;
    if results.first().is_some_and(Result::is_ok) || !results.iter().skip(1).all(Result::is_ok) {
        return Err(format!("made good in the same call: {results:?}"));
    }
    fixture.expect(&[right]).await?;
    fixture.expect(&bad).await
}

/// A device that goes in the middle of a call: what comes after finds it missing, and what is to be
/// removed from it is gone.
pub async fn a_device_that_goes_in_a_batch_is_missing_after(fixture: &KernelFixture) -> Outcome {
    let device = fixture.vxlan(Family::V4);
    fixture.make(std::slice::from_ref(&device)).await?;
    let before = fixture.path(Family::V4, 2);
    let after: Vec<_> = fixture
        .path(Family::V4, 3)
        .into_iter()
        .skip(1)
        // What needs another one would be skipped for its sake.
        .filter(|object| {
            !object
                .needs()
                .iter()
                .any(|key| !matches!(key, ObjectKey::Link(_)))
        })
        .collect();
    let mut ops: Vec<_> = before.iter().cloned().map(Op::Create).collect();
    ops.push(Op::Delete(device));
    let gone_at = ops.len();
    ops.extend(after.iter().cloned().map(Op::Create));
    let missing_to = ops.len();
    ops.extend(before.iter().rev().cloned().map(Op::Delete));
    let results = fixture.kernel.apply(&ops).await;
    for (at, (op, result)) in ops.iter().zip(&results).enumerate() {
        let fits = match result {
            Ok(()) => !(gone_at..missing_to).contains(&at),
            Err(Error::NoSuchDevice { .. }) => (gone_at..missing_to).contains(&at),
            Err(_) => false,
        };
        if !fits {
            return Err(format!("{} {}: {result:?}", op.verb(), op.object()));
        }
    }
    fixture.expect_none(&before).await
}

/// A device that somebody else deletes while a call is under way: some ops are made, the rest find
/// it missing or are skipped for one that did, and a call never ends otherwise.
///
/// Says whether the call was met in its middle; of a kernel that takes a call as a whole it never
/// is.
///
/// # Errors
/// What was found instead.
pub async fn a_device_deleted_by_others_meanwhile(fixture: &KernelFixture) -> Result<bool, String> {
    let Object::Link(link) = fixture.vxlan(Family::V4) else {
        return Ok(false);
    };
    let device = Object::Link(link.clone());
    fixture.make(std::slice::from_ref(&device)).await?;
    let entries: Vec<_> = (0..2000_u16)
        .map(|n| {
            let [a, b] = n.to_be_bytes();
            Object::Fdb(Fdb {
                dev: link.name,
                mac: MacAddr([0x0e, 1, 0, 0, a, b]),
                remote: ip("192.0.2.9"),
            })
        })
        .collect();
    let ops: Vec<_> = entries.into_iter().map(Op::Create).collect();
    let delete = [Op::Delete(device)];
    let deleting = fixture.foreign.apply(&delete);
    let (results, deleted) = tokio::join!(fixture.kernel.apply(&ops), deleting);
    if let Some(Err(error)) = deleted.into_iter().find(Result::is_err) {
        return Err(format!("the deletion: {error}"));
    }
    let mut missing = false;
    let mut made = false;
    for (op, result) in ops.iter().zip(&results) {
        match result {
            Ok(()) if !missing => made = true,
            Err(Error::NoSuchDevice { .. }) => missing = true,
            result => return Err(format!("{} {}: {result:?}", op.verb(), op.object())),
        }
    }
    Ok(made && missing)
}

/// While others make and remove, a reading shows all that stays, or is an error that passes.
pub async fn a_reading_among_changes_is_whole_or_an_error(fixture: &KernelFixture) -> Outcome {
    let mut stays = fixture.world();
    let mut comes = Vec::new();
    for family in fixture.families() {
        for n in 3..40 {
            stays.extend(fixture.path(family, n).into_iter().skip(1));
        }
        for n in 100..160 {
            comes.extend(fixture.path(family, n).into_iter().skip(1));
        }
    }
    fixture.make(&stays).await?;
    let creates: Vec<_> = comes.iter().cloned().map(Op::Create).collect();
    let deletes: Vec<_> = comes.iter().rev().cloned().map(Op::Delete).collect();
    let churn = async {
        for _ in 0..10 {
            fixture.foreign.apply(&creates).await;
            fixture.foreign.apply(&deletes).await;
        }
    };
    let read = async {
        let mut whole = 0;
        for _ in 0..20 {
            let devices = [fixture.underlay, KernelFixture::overlay(Family::V4)];
            let scope = Scope {
                devices: devices
                    .into_iter()
                    .chain([KernelFixture::overlay(Family::V6)])
                    .collect(),
                settings: BTreeSet::new(),
            };
            match fixture.kernel.observe(&scope).await {
                Ok(observed) => {
                    whole += 1;
                    if let Some(lost) = stays
                        .iter()
                        .find(|object| !observed.objects.contains_key(&object.key()))
                    {
                        return Err(format!("a reading without {lost}"));
                    }
                }
                Err(error) if error.is_transient() => {}
                Err(error) => return Err(format!("a reading that failed for good: {error}")),
            }
        }
        Ok(whole)
    };
    let ((), outcome) = tokio::join!(churn, read);
    outcome?;
    // Once nobody disturbs, it is whole.
    fixture.expect(&stays).await
}

/// The settings that are read alone are those that a reading of everything shows, also those that
/// nobody ever wrote.
pub async fn settings_alone_are_those_of_the_whole(fixture: &KernelFixture) -> Outcome {
    let mut settings = fixture.samples();
    fixture.make(&settings).await?;
    settings.retain(|object| matches!(object, Object::Sysctl(_) | Object::Offload(_)));
    let dev = KernelFixture::overlay(Family::V4);
    if fixture.features.sysctls {
        settings.push(Object::Sysctl(Sysctl {
            dev,
            family: Family::V4,
            name: "proxy_arp".to_owned(),
            value: "0".to_owned(),
        }));
    }
    let mut keys: BTreeSet<_> = settings.iter().map(Object::key).collect();
    let mut whole = fixture.observe(&settings).await?.objects;
    whole.retain(|key, _| keys.contains(key));
    keys.insert(ObjectKey::Offload {
        dev: name("fl.nowhere"),
        feature: "tx-checksum-ip-generic".to_owned(),
    });
    let alone = fixture.kernel.settings(&keys).await.map_err(text)?;
    if alone.len() != settings.len() {
        return Err(format!("asked for {settings:?}, read {alone:?}"));
    }
    same("settings, read alone,", &whole, &alone)
}

/// Whatever is done to a device is hinted at as a change of that device, even where its objects go
/// along without a word.
pub async fn changes_of_a_device_are_hinted(fixture: &KernelFixture) -> Outcome {
    let mut hints = fixture.kernel.changes();
    drain(&mut hints).await;
    for family in fixture.families() {
        fixture.make(&[fixture.vxlan(family)]).await?;
        fixture.make(&fixture.path(family, 2)).await?;
        let Object::Link(link) = fixture.vxlan(family) else {
            continue;
        };
        let changes = [
            Link {
                mtu: Some(1290),
                ..link.clone()
            },
            Link {
                mac: Some(MacAddr([0x0e, 0, 0, 0, 0, 9])),
                ..link.clone()
            },
            Link {
                alias: Some("flannel:another".to_owned()),
                ..link.clone()
            },
            Link {
                up: false,
                ..link.clone()
            },
            link,
        ];
        for change in changes {
            drain(&mut hints).await;
            let dev = change.name;
            let shown = Object::Link(change.clone());
            fixture.by_others(Op::Change(Object::Link(change))).await?;
            let fits = |hint: &Change| match hint {
                Change::All => true,
                Change::Link(on) => *on == Some(dev),
                // What it took along must be in doubt.
                Change::Set(Object::Link(link)) => link.name == dev && link.up,
                _ => false,
            };
            if next_fitting(&mut hints, fits).await.is_none() {
                return Err(format!("no hint at the change to {shown}"));
            }
        }
    }
    Ok(())
}

/// Hints that are lost are told as such, and the watch goes on. `lose` is called when the watch is
/// on, and must make that the hints at the change of many objects, which follows, do not all
/// arrive.
///
/// # Errors
/// What was found instead.
pub async fn lost_hints_are_told(fixture: &KernelFixture, lose: impl FnOnce() + Send) -> Outcome {
    fixture.make(&[fixture.vxlan(Family::V4)]).await?;
    let mut hints = fixture.kernel.changes();
    if next_fitting(&mut hints, |hint| *hint == Change::All)
        .await
        .is_none()
    {
        return Err("the watch does not begin with All".to_owned());
    }
    drain(&mut hints).await;
    lose();
    let dev = KernelFixture::overlay(Family::V4);
    let many: Vec<_> = (0..4000_u16)
        .map(|n| {
            let [a, b] = n.to_be_bytes();
            Op::Create(Object::Fdb(Fdb {
                dev,
                mac: MacAddr([0x0e, 2, 0, 0, a, b]),
                remote: ip("192.0.2.9"),
            }))
        })
        .collect();
    let results = fixture.foreign.apply(&many).await;
    all_ok("foreign kernel", &many, results)?;
    if next_fitting(&mut hints, |hint| *hint == Change::All)
        .await
        .is_none()
    {
        return Err("nobody was told that hints were lost".to_owned());
    }
    drain(&mut hints).await;
    let later = address(dev, "10.99.0.1", 32);
    fixture.by_others(Op::Create(later)).await?;
    let fits = |hint: &Change| {
        matches!(
            hint,
            Change::All | Change::Address(_) | Change::Set(Object::Address(_))
        )
    };
    match next_fitting(&mut hints, fits).await {
        Some(_) => Ok(()),
        None => Err("the watch did not go on".to_owned()),
    }
}
