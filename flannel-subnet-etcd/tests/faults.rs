//! What a real etcd and the way to it can do to us.
//!
//! Times are real: servers have clocks of their own. Nothing is asserted of how long something
//! takes but that it happens at all, within half a minute.

mod common;

use std::time::Duration;

use common::{
    CONFIG, SOON, acquire, begun, hand, item, manager, options, put, request, server, until,
    until_answered,
};
use etcd_client::CompactionOptions;
use flannel_core::manager::Error;
use flannel_core::{Event, Manager, NodeId};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::servers::{Etcd, EtcdOptions as ServerOptions, EtcdVersion, TcpSwitch};
use tokio::time::timeout;

common::on_each_etcd! {
    a_server_that_is_killed_and_comes_back_costs_nothing
    a_frozen_server_is_noticed_and_a_thawed_one_is_used_again
    one_dead_or_frozen_endpoint_of_several_loses_no_call
    an_endpoint_that_freezes_under_way_loses_no_call
    history_that_is_compacted_away_while_we_are_cut_off_is_read_anew
    a_restored_backup_is_noticed
    a_store_that_is_full_says_so_and_keeps_the_leases_it_has
    a_user_without_rights_is_told_and_one_with_the_readmes_rights_can_do_everything
    a_lease_that_ran_out_while_we_were_frozen_is_not_revived
    connections_of_an_address_that_is_gone_are_left_at_once
}

/// What a record of Go flannel says.
fn theirs(last: u8) -> String {
    format!(r#"{{"PublicIP":"192.0.2.{last}","PublicIPv6":null}}"#)
}

fn key(third: u8) -> String {
    format!("/coreos.com/network/subnets/10.5.{third}.0-24")
}

/// Follows a watch until it has told of a record, in whatever way.
async fn sees(watch: &mut flannel_core::EventStream, key: &str) {
    until(watch, |item| match item {
        Ok(Event::Put(lease)) => (lease.key.as_str() == key).then_some(()),
        Ok(Event::Snapshot(snapshot)) => {
            let mut keys = snapshot.leases.iter().map(|lease| lease.key.as_str());
            keys.any(|found| found == key).then_some(())
        }
        _ => None,
    })
    .await;
}

async fn a_server_that_is_killed_and_comes_back_costs_nothing(version: EtcdVersion) {
    let (mut etcd, _client) = server(version, CONFIG).await;
    let ours = manager(options(etcd.endpoint()));
    let lease = acquire(&ours, &request("a", 1)).await;
    let mut watch = begun(&ours).await;
    etcd.kill();
    until(&mut watch, |item| item.is_err().then_some(())).await;
    let down = ours.renew_lease(&lease).await;
    assert!(matches!(down, Err(Error::Unavailable { .. })), "{down:?}");
    etcd.restart().expect("it starts again");
    put(&mut hand(&etcd).await, &key(9), &theirs(9)).await;
    sees(&mut watch, &key(9)).await;
    let renewed = until_answered(|| ours.renew_lease(&lease)).await;
    assert_eq!(renewed.key, lease.key);
}

async fn a_frozen_server_is_noticed_and_a_thawed_one_is_used_again(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let ours = manager(options(etcd.endpoint()));
    let lease = acquire(&ours, &request("a", 1)).await;
    let mut watch = begun(&ours).await;
    etcd.freeze();
    let noticed = until(&mut watch, |item| item.err());
    let error = timeout(Duration::from_secs(12), noticed).await;
    let error = error.expect("within seconds");
    assert!(error.is_transient(), "{error:?}");
    let hangs = ours.renew_lease(&lease).await;
    assert!(matches!(hangs, Err(Error::Unavailable { .. })), "{hangs:?}");
    etcd.thaw();
    put(&mut client, &key(9), &theirs(9)).await;
    sees(&mut watch, &key(9)).await;
    until_answered(|| ours.renew_lease(&lease)).await;
}

async fn one_dead_or_frozen_endpoint_of_several_loses_no_call(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let frozen = TcpSwitch::new(etcd.address()).await.expect("a port");
    let dead = TcpSwitch::new(etcd.address()).await.expect("a port");
    frozen.freeze(true);
    dead.turn(None);
    let endpoints = [frozen.address(), dead.address(), etcd.address()];
    // Whichever comes first.
    for turn in 0..endpoints.len() {
        let mut endpoints = endpoints.map(|address| format!("http://{address}"));
        endpoints.rotate_left(turn);
        let options = EtcdOptions::new(endpoints).expect("endpoints");
        let ours = manager(options.call_timeout(Duration::from_millis(500)));
        let last = u8::try_from(turn).expect("a few") + 1;
        let lease = acquire(&ours, &request(&format!("node-{turn}"), last)).await;
        for _ in 0..20 {
            ours.renew_lease(&lease).await.expect("no call is lost");
        }
        let mut watch = begun(&ours).await;
        let third = 100 + last;
        put(&mut client, &key(third), &theirs(third)).await;
        sees(&mut watch, &key(third)).await;
    }
}

async fn an_endpoint_that_freezes_under_way_loses_no_call(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let first = TcpSwitch::new(etcd.address()).await.expect("a port");
    let second = TcpSwitch::new(etcd.address()).await.expect("a port");
    let endpoints = [first.address(), second.address()].map(|address| format!("http://{address}"));
    let options = EtcdOptions::new(endpoints).expect("endpoints");
    let ours = manager(options.call_timeout(Duration::from_millis(500)));
    let lease = acquire(&ours, &request("a", 1)).await;
    let mut watch = begun(&ours).await;
    for (third, (stays, freezes)) in [(20, (&first, &second)), (21, (&second, &first))] {
        stays.freeze(false);
        freezes.freeze(true);
        for _ in 0..5 {
            ours.renew_lease(&lease).await.expect("no call is lost");
        }
        put(&mut client, &key(third), &theirs(third)).await;
        sees(&mut watch, &key(third)).await;
    }
}

async fn history_that_is_compacted_away_while_we_are_cut_off_is_read_anew(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let switch = TcpSwitch::new(etcd.address()).await.expect("a port");
    let ours = manager(options(format!("http://{}", switch.address())));
    acquire(&ours, &request("a", 1)).await;
    put(&mut client, &key(8), &theirs(8)).await;
    let mut watch = begun(&ours).await;
    switch.turn(None);
    until(&mut watch, |item| item.is_err().then_some(())).await;
    for third in 30..40 {
        put(&mut client, &key(third), &theirs(third)).await;
    }
    client.delete(key(8), None).await.expect("an answer");
    let revision = client.get("x", None).await.expect("an answer");
    let revision = revision.header().expect("a header").revision();
    let physical = Some(CompactionOptions::new().with_physical());
    client.compact(revision, physical).await.expect("an answer");
    switch.turn(Some(etcd.address()));
    let snapshot = until(&mut watch, |item| match item {
        Ok(Event::Snapshot(snapshot)) => Some(snapshot),
        _ => None,
    })
    .await;
    let keys: Vec<&str> = snapshot
        .leases
        .iter()
        .map(|lease| lease.key.as_str())
        .collect();
    assert!(!keys.contains(&key(8).as_str()), "{keys:?}");
    assert!(
        (30..40).all(|third| keys.contains(&key(third).as_str())),
        "{keys:?}"
    );
}

async fn a_restored_backup_is_noticed(version: EtcdVersion) {
    let (mut etcd, mut client) = server(version, CONFIG).await;
    let ours = manager(options(etcd.endpoint()));
    put(&mut client, &key(50), &theirs(50)).await;
    // A backup, taken cold.
    etcd.kill();
    let backup = etcd.folder().join("backup");
    copy(&etcd.data(), &backup);
    etcd.restart().expect("it starts again");
    let wants = request("a", 1);
    let lease = until_answered(|| ours.acquire_lease(&wants)).await;
    let mut client = hand(&etcd).await;
    for third in 60..70 {
        put(&mut client, &key(third), &theirs(third)).await;
    }
    let mut watch = begun(&ours).await;
    etcd.kill();
    std::fs::remove_dir_all(etcd.data()).expect("it is there");
    copy(&backup, &etcd.data());
    etcd.restart().expect("it starts from the backup");
    let snapshot = until(&mut watch, |item| match item {
        Ok(Event::Snapshot(snapshot)) => Some(snapshot),
        _ => None,
    })
    .await;
    let keys: Vec<&str> = snapshot
        .leases
        .iter()
        .map(|lease| lease.key.as_str())
        .collect();
    assert_eq!(keys, [key(50)]);
    let lost = until_answered_or_lost(&ours, &lease).await;
    assert!(matches!(lost, Error::LeaseLost { .. }), "{lost:?}");
    // Revisions that were used before are used again, and nobody is fooled.
    let mut client = hand(&etcd).await;
    for third in 80..95 {
        put(&mut client, &key(third), &theirs(third)).await;
    }
    sees(&mut watch, &key(94)).await;
    let again = ours.renew_lease(&lease).await;
    assert!(matches!(again, Err(Error::LeaseLost { .. })), "{again:?}");
    let mut wants = wants;
    wants.previous = lease.subnet;
    assert_eq!(acquire(&ours, &wants).await.subnet, lease.subnet);
}

async fn until_answered_or_lost(ours: &EtcdManager, lease: &flannel_core::Lease) -> Error {
    let lost = async {
        loop {
            match ours.renew_lease(lease).await {
                Err(error) if error.is_transient() => {}
                Err(error) => return error,
                Ok(_) => panic!("a lease that is not in the store was renewed"),
            }
        }
    };
    timeout(SOON, lost).await.expect("an answer, soon")
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a copy");
        }
    }
}

async fn a_store_that_is_full_says_so_and_keeps_the_leases_it_has(version: EtcdVersion) {
    let etcd = Etcd::with(ServerOptions {
        version,
        flags: vec!["--quota-backend-bytes".to_owned(), "1048576".to_owned()],
        ..ServerOptions::default()
    });
    let etcd = etcd.expect("etcd starts");
    let mut client = hand(&etcd).await;
    put(&mut client, "/coreos.com/network/config", CONFIG).await;
    let ours = manager(options(etcd.endpoint()));
    let lease = acquire(&ours, &request("a", 1)).await;
    let big = "x".repeat(256 << 10);
    let mut full = false;
    for n in 0..200 {
        let fill = client.put(format!("/fill/{n}"), big.as_str(), None).await;
        full = fill.is_err();
        if full {
            break;
        }
        // It counts what it has committed, ten times a second.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(full, "the store is not full: the test shows nothing");
    let refused = ours.acquire_lease(&request("b", 2)).await;
    let Err(error @ Error::Unavailable { .. }) = refused else {
        panic!("{refused:?}");
    };
    let text = flannel_core::error_chain(&error);
    assert!(
        text.contains("space") && text.contains("defragmented"),
        "{text}"
    );
    let renewed = ours.renew_lease(&lease).await;
    assert_eq!(renewed.expect("it needs no write").key, lease.key);
}

async fn a_user_without_rights_is_told_and_one_with_the_readmes_rights_can_do_everything(
    version: EtcdVersion,
) {
    use etcd_client::{Permission, RoleRevokePermissionOptions};
    use flannel_subnet_etcd::Password;

    let (etcd, mut client) = server(version, CONFIG).await;
    client
        .user_add("root", "rootpw", None)
        .await
        .expect("an answer");
    client.role_add("root").await.expect("an answer");
    client
        .user_grant_role("root", "root")
        .await
        .expect("an answer");
    for name in ["node", "nobody"] {
        client
            .user_add(name, "pa55word", None)
            .await
            .expect("an answer");
    }
    client.role_add("flannel").await.expect("an answer");
    let prefix = "/coreos.com/network/";
    let all = Permission::read_write(prefix).with_prefix();
    client
        .role_grant_permission("flannel", all)
        .await
        .expect("an answer");
    client
        .user_grant_role("node", "flannel")
        .await
        .expect("an answer");
    client.auth_enable().await.expect("an answer");

    let file = etcd.folder().join("password");
    std::fs::write(&file, "pa55word\n").expect("written");
    let node = manager(options(etcd.endpoint()).user("node", Password::file(&file)));
    let lease = acquire(&node, &request("a", 1)).await;
    let mut watch = begun(&node).await;
    let mut changed = lease.clone();
    changed.attrs = request("a", 2).attrs;
    let lease = node.renew_lease(&changed).await.expect("it may");
    until(&mut watch, |item| {
        matches!(item, Ok(Event::Put(_))).then_some(())
    })
    .await;
    node.release_lease(&lease).await.expect("it may");

    for (user, password) in [("nobody", "pa55word"), ("node", "wrong-secret")] {
        let refused = manager(options(etcd.endpoint()).user(user, Password::text(password)));
        let error = refused
            .acquire_lease(&request("b", 3))
            .await
            .expect_err("it may not");
        assert!(matches!(error, Error::Denied { .. }), "{user}: {error:?}");
        let text = format!("{error:?} {}", flannel_core::error_chain(&error));
        assert!(!text.contains(password), "{text}");
        let mut watch = refused.watch_leases();
        assert!(matches!(item(&mut watch).await, Err(Error::Denied { .. })));
    }
    let nameless = manager(options(etcd.endpoint()))
        .acquire_lease(&request("b", 3))
        .await;
    assert!(
        matches!(nameless, Err(Error::Denied { .. })),
        "{nameless:?}"
    );

    // A password that is changed, in etcd and then in the file.
    let root = etcd_client::ConnectOptions::new().with_user("root", "rootpw");
    let root = etcd_client::Client::connect([etcd.endpoint()], Some(root)).await;
    let mut root = root.expect("root may");
    root.user_change_password("node", "new-pa55word")
        .await
        .expect("an answer");
    std::fs::write(&file, "new-pa55word\n").expect("written");
    let wants = request("a", 1);
    until_answered(|| node.acquire_lease(&wants)).await;
    root.role_revoke_permission(
        "flannel",
        prefix,
        Some(RoleRevokePermissionOptions::new().with_prefix()),
    )
    .await
    .expect("an answer");
    let revoked = node.acquire_lease(&request("a", 1)).await;
    assert!(matches!(revoked, Err(Error::Denied { .. })), "{revoked:?}");
}

async fn a_lease_that_ran_out_while_we_were_frozen_is_not_revived(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let switch = TcpSwitch::new(etcd.address()).await.expect("a port");
    let options = options(format!("http://{}", switch.address()));
    let ours = manager(options.ttl(Duration::from_secs(5)));
    let lease = acquire(&ours, &request("a", 1)).await;
    switch.freeze(true);
    let gone = async {
        while !client
            .get(lease.key.as_str(), None)
            .await
            .expect("an answer")
            .kvs()
            .is_empty()
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(SOON, gone).await.expect("it runs out");
    switch.freeze(false);
    let lost = until_answered_or_lost(&ours, &lease).await;
    assert!(matches!(lost, Error::LeaseLost { .. }), "{lost:?}");
    let again = acquire(&ours, &request("a", 1)).await;
    assert_eq!(again.node, NodeId::new("a").expect("a name"));
    assert!(again.created > lease.created);
}

async fn connections_of_an_address_that_is_gone_are_left_at_once(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let switch = TcpSwitch::new(etcd.address()).await.expect("a port");
    // Nothing else would notice within the time of this test.
    let long = Duration::from_secs(60);
    let options = options(format!("http://{}", switch.address()));
    let ours = manager(options.call_timeout(long).progress_every(long));
    let lease = acquire(&ours, &request("a", 1)).await;
    let mut watch = begun(&ours).await;
    switch.strand();
    let (asking, of) = (ours.clone(), lease.clone());
    let hangs = tokio::spawn(async move { asking.renew_lease(&of).await });
    put(&mut client, &key(9), &theirs(9)).await;
    tokio::task::yield_now().await;
    ours.reconnect();
    sees(&mut watch, &key(9)).await;
    let answer = timeout(SOON, hangs).await.expect("it waits no longer");
    let answer = answer.expect("it does not panic");
    let answered = answer.is_ok_and(|renewed| renewed.key == lease.key);
    if !answered {
        until_answered(|| ours.renew_lease(&lease)).await;
    }
}
