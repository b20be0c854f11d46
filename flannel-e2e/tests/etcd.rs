//! Pods on nodes that share a pool through a real etcd, while etcd fails: not a packet is lost, not
//! a route is withdrawn.
#![allow(missing_docs, reason = "tests")]

#[path = "../../flannel-subnet-etcd/tests/common/authority.rs"]
mod authority;
#[path = "etcd/bed.rs"]
mod bed;

use std::path::PathBuf;
use std::time::Duration;

use authority::Authority;
use bed::{CONFIG, on_etcd, on_etcd_with};
use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, Certificate, Client, CompactionOptions, PutOptions,
    TlsOptions,
};
use flannel_core::{ConditionType, OverlayEvent};
use flannel_e2e::{DUAL, alone};
use flannel_subnet_etcd::TlsFiles;
use flannel_testkit::servers::EtcdOptions as ServerOptions;

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_killed_and_comes_back_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-killed").await else {
        return;
    };
    bed.unharmed("kill -9", async |bed| {
        bed.store.etcd.kill();
        bed.noticed().await;
        bed.store.etcd.restart().expect("it starts again");
        bed.healed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_frozen_for_30_s_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-frozen").await else {
        return;
    };
    bed.unharmed("SIGSTOP", async |bed| {
        bed.store.etcd.freeze();
        let frozen = tokio::time::sleep(Duration::from_secs(30));
        bed.noticed().await;
        frozen.await;
        bed.store.etcd.thaw();
        bed.healed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_while_the_nodes_are_cut_off_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-compacted").await else {
        return;
    };
    bed.unharmed("compaction", async |bed| {
        bed.switch.turn(None);
        bed.noticed().await;
        for n in 0..20 {
            bed.store
                .client
                .put(format!("/other/{n}"), "x", None)
                .await
                .expect("an answer");
        }
        let config = bed
            .store
            .client
            .put(CONFIG, DUAL, Some(PutOptions::new().with_prev_key()))
            .await;
        let header = config.expect("an answer");
        let revision = header.header().expect("a header").revision();
        let physical = Some(CompactionOptions::new().with_physical());
        bed.store
            .client
            .compact(revision, physical)
            .await
            .expect("an answer");
        bed.switch.turn(Some(bed.store.etcd.address()));
        bed.healed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_are_taken_away_and_given_back_lose_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-denied").await else {
        return;
    };
    bed.store
        .client
        .user_add("root", "rootpw", None)
        .await
        .expect("an answer");
    bed.store.client.role_add("root").await.expect("an answer");
    bed.store
        .client
        .user_grant_role("root", "root")
        .await
        .expect("an answer");
    bed.unharmed("permission denied", async |bed| {
        bed.store.client.auth_enable().await.expect("an answer");
        // A watch that is open stays so; what is broken comes back as a stranger.
        bed.switch.interrupt();
        bed.noticed().await;
        let root = etcd_client::ConnectOptions::new().with_user("root", "rootpw");
        let root = Client::connect([bed.store.etcd.endpoint()], Some(root)).await;
        root.expect("root may")
            .auth_disable()
            .await
            .expect("an answer");
        bed.healed().await;
    })
    .await;
}

/// Leases of a few seconds, so that they are renewed again and again meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_full_loses_no_packet_and_no_lease() {
    let _alone = alone().await;
    let server = ServerOptions {
        flags: vec!["--quota-backend-bytes=2097152".to_owned()],
        ..ServerOptions::default()
    };
    let short = |options: flannel_subnet_etcd::EtcdOptions| options.ttl(Duration::from_secs(6));
    let Some(mut bed) = on_etcd_with("etcd-full", server, None, short).await else {
        return;
    };
    let mut renewed = bed.cluster.nodes[0].overlay().events();
    bed.unharmed("quota", async |bed| {
        let big = "x".repeat(256 << 10);
        let mut is_full = false;
        for n in 0..64 {
            let put = bed
                .store
                .client
                .put(format!("/fill/{n}"), big.as_str(), None)
                .await;
            is_full |= put.is_err();
        }
        assert!(is_full, "etcd is not full: the test shows nothing");
        while renewed.try_recv().is_ok() {}
        for _ in 0..3 {
            loop {
                let event = renewed.recv().await.expect("it goes on");
                let is_lost = matches!(event, OverlayEvent::LeaseLost { .. });
                assert!(!is_lost, "{event:?}");
                if event == OverlayEvent::LeaseRenewed {
                    break;
                }
            }
        }
        // As its documentation says: compacted, defragmented, disarmed.
        let answer = "an answer";
        let all = etcd_client::DeleteOptions::new().with_prefix();
        let deleted = bed
            .store
            .client
            .delete("/fill/", Some(all))
            .await
            .expect(answer);
        let revision = deleted.header().expect("a header").revision();
        let physical = Some(CompactionOptions::new().with_physical());
        bed.store
            .client
            .compact(revision, physical)
            .await
            .expect(answer);
        bed.store.client.defragment().await.expect(answer);
        let nospace = AlarmType::Nospace;
        let alarms = bed
            .store
            .client
            .alarm(AlarmAction::Get, nospace, None)
            .await;
        for alarm in alarms.expect(answer).alarms() {
            let mut of = AlarmOptions::new();
            of.with_member(alarm.member_id());
            let off = bed
                .store
                .client
                .alarm(AlarmAction::Deactivate, nospace, Some(of));
            off.await.expect(answer);
        }
        let config = bed.store.client.put(CONFIG, DUAL, None).await;
        config.expect("it takes writes again");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_file_that_is_replaced_by_a_wrong_one_loses_no_packet() {
    let _alone = alone().await;
    let folder = std::env::temp_dir().join(format!("flannel-e2e-ca-{}", std::process::id()));
    let (right, wrong) = (
        Authority::new(&folder, "right"),
        Authority::new(&folder.join("wrong"), "wrong"),
    );
    let (certificate, key) = right.issue("server");
    let server = ServerOptions {
        tls: Some((certificate, key, None)),
        ..ServerOptions::default()
    };
    let pem = std::fs::read(&right.ca).expect("it was written");
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(&pem));
    let ca: PathBuf = folder.join("ca.pem");
    std::fs::copy(&right.ca, &ca).expect("a copy");
    let files = TlsFiles {
        ca: Some(ca.clone()),
        ..TlsFiles::default()
    };
    let trust = move |options: flannel_subnet_etcd::EtcdOptions| options.tls(files.clone());
    if let Some(mut bed) = on_etcd_with("etcd-ca", server, Some(tls), trust).await {
        bed.unharmed("wrong CA", async |bed| {
            std::fs::copy(&wrong.ca, &ca).expect("a copy");
            bed.switch.interrupt();
            bed.all("it is told what is wrong", |status| {
                let store = status.condition(ConditionType::Store);
                store.is_some_and(|store| store.message.contains("not signed by the CA"))
            })
            .await;
            std::fs::copy(&right.ca, &ca).expect("a copy");
            bed.healed().await;
        })
        .await;
    }
    std::fs::remove_dir_all(&folder).expect("it is there");
}
