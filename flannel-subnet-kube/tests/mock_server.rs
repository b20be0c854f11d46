//! What a real API server will not do on demand: refusals, silences, answers that are cut off. On a
//! server of nothing but prepared answers, in paused time.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use flannel_core::manager::Error;
use flannel_core::{
    DualStack, Event, EventStream, LeaseAttrs, LeaseRequest, Manager, NodeId, PublicIp,
};
use flannel_subnet_kube::{
    Access, AnnotationPrefix, Client, ConfigSource, KubeManager, KubeOptions,
};
use http::{Request, Response};
use http_body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::time::Instant;

type Bytes = <Body as http_body::Body>::Data;

/// How a prepared answer goes on after its head.
#[derive(Debug, Clone)]
enum Then {
    End,
    /// Nothing more comes, and no end.
    Hang,
}

#[derive(Debug, Clone)]
enum Answer {
    /// A status, a `Retry-After` and a body in pieces.
    Head(u16, Option<u32>, Vec<String>, Then),
    /// Not even a status.
    Silence,
    /// The connection breaks.
    Broken,
}

impl Answer {
    fn ok(body: &Value) -> Self {
        Self::Head(200, None, vec![body.to_string()], Then::End)
    }

    /// A watch that says these lines.
    fn watch(lines: &[Value], then: Then) -> Self {
        let lines = lines.iter().map(|line| format!("{line}\n")).collect();
        Self::Head(200, None, lines, then)
    }

    fn refusal(code: u16, reason: &str, message: &str) -> Self {
        let status = json!({"kind": "Status", "code": code, "reason": reason, "message": message});
        Self::Head(code, None, vec![status.to_string()], Then::End)
    }
}

/// A body that comes in pieces.
struct Pieces(VecDeque<String>, Then);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match (self.0.pop_front(), &self.1) {
            (Some(piece), _) => Poll::Ready(Some(Ok(Frame::data(piece.into())))),
            (None, Then::End) => Poll::Ready(None),
            (None, Then::Hang) => Poll::Pending,
        }
    }
}

/// What was asked: when, and what.
type Asked = (Instant, String);

/// A server of prepared answers: each is for a request that has these words in it, and is used up.
#[derive(Clone, Default)]
struct Mock(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    prepared: VecDeque<(&'static str, Answer)>,
    /// What is said to whatever is asked when nothing is prepared.
    rest: Option<Answer>,
    asked: Vec<Asked>,
}

impl Mock {
    fn new(prepared: Vec<(&'static str, Answer)>, rest: Answer) -> Self {
        let mock = Self::default();
        {
            let mut state = mock.state();
            state.prepared = prepared.into();
            state.rest = Some(rest);
        }
        mock
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn manager(&self) -> KubeManager {
        self.manager_with(|options| options)
    }

    fn manager_with(&self, set: impl FnOnce(KubeOptions) -> KubeOptions) -> KubeManager {
        let mock = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let mock = mock.clone();
            let line = format!("{} {}", request.method(), request.uri());
            async move { mock.answer(line).await }
        });
        let access = Access::client(Client::new(service, "default"));
        let config = ConfigSource::Text(r#"{"Network":"10.5.0.0/16"}"#.to_owned());
        let options = KubeOptions::new(access, config, AnnotationPrefix::default());
        let options = set(options.network_condition(false));
        KubeManager::new(options).expect("sound settings")
    }

    async fn answer(&self, line: String) -> Result<Response<Pieces>, std::io::Error> {
        let answer = {
            let mut state = self.state();
            state.asked.push((Instant::now(), line.clone()));
            let fits = |(words, _): &(&str, Answer)| words.split(' ').all(|it| line.contains(it));
            match state.prepared.iter().position(fits) {
                Some(at) => state.prepared.remove(at).map(|(_, answer)| answer),
                None => state.rest.clone(),
            }
        };
        match answer {
            Some(Answer::Head(status, wait, pieces, then)) => {
                let mut response = Response::new(Pieces(pieces.into(), then));
                *response.status_mut() = status.try_into().expect("a status");
                if let Some(wait) = wait {
                    response.headers_mut().insert("retry-after", wait.into());
                }
                Ok(response)
            }
            Some(Answer::Broken) => Err(std::io::Error::other("the connection broke")),
            Some(Answer::Silence) | None => std::future::pending().await,
        }
    }

    /// What was asked about this so far.
    fn asked(&self, words: &str) -> Vec<Asked> {
        let state = self.state();
        let fits = |(_, line): &&Asked| words.split(' ').all(|word| line.contains(word));
        state.asked.iter().filter(fits).cloned().collect()
    }

    fn assert_used_up(&self) {
        let state = self.state();
        assert!(
            state.prepared.is_empty(),
            "never asked for: {:?}",
            state.prepared
        );
    }
}

fn kube_node(name: &str, version: u64, mac: u8) -> Value {
    let prefix = "flannel.alpha.coreos.com";
    json!({
        "metadata": {
            "name": name,
            "uid": format!("uid-{name}"),
            "resourceVersion": version.to_string(),
            "creationTimestamp": "2026-11-21T16:41:08Z",
            "annotations": {
                format!("{prefix}/kube-subnet-manager"): "true",
                format!("{prefix}/backend-type"): "vxlan",
                format!("{prefix}/backend-data"): format!("{{\"VNI\":{mac}}}"),
                format!("{prefix}/public-ip"): "192.0.2.1",
            },
        },
        "spec": {"podCIDR": "10.5.1.0/24", "podCIDRs": ["10.5.1.0/24"]},
    })
}

fn list(version: u64, nodes: &[Value]) -> Answer {
    let version = version.to_string();
    Answer::ok(&json!({
        "kind": "NodeList",
        "apiVersion": "v1",
        "metadata": {"resourceVersion": version},
        "items": nodes,
    }))
}

fn change(kind: &str, object: &Value) -> Value {
    json!({"type": kind, "object": object})
}

fn gone() -> Value {
    change(
        "ERROR",
        &json!({"kind": "Status", "code": 410, "reason": "Expired"}),
    )
}

fn bookmark(version: u64) -> Value {
    let version = version.to_string();
    change(
        "BOOKMARK",
        &json!({"kind": "Node", "metadata": {"resourceVersion": version}}),
    )
}

/// A watch that is open and says nothing.
fn quiet() -> Answer {
    Answer::watch(&[], Then::Hang)
}

async fn item(watch: &mut EventStream) -> Result<Event, Error> {
    let item = poll_fn(|cx| watch.as_mut().poll_next(cx));
    let item = tokio::time::timeout(Duration::from_secs(3600), item).await;
    item.expect("an item within the hour")
        .expect("a watch does not end")
}

async fn event(watch: &mut EventStream) -> Event {
    item(watch).await.expect("no failure")
}

/// The names of a snapshot's records.
async fn snapshot(watch: &mut EventStream) -> Vec<String> {
    let snapshot = match event(watch).await {
        Event::Snapshot(snapshot) => snapshot,
        other => panic!("not a snapshot: {other:?}"),
    };
    assert!(
        matches!(event(watch).await, Event::Config(_)),
        "the config follows"
    );
    let names = snapshot.leases.iter();
    names.map(|lease| lease.key.as_str().to_owned()).collect()
}

async fn failure(watch: &mut EventStream) -> Error {
    item(watch).await.expect_err("a failure")
}

#[tokio::test(start_paused = true)]
async fn lost_history_is_followed_by_a_snapshot_at_once() {
    let refused = Answer::refusal(410, "Expired", "too old resource version");
    for first in [Answer::watch(&[gone()], Then::End), refused] {
        let [a, b] = [kube_node("a", 3, 1), kube_node("b", 4, 1)];
        let told = change("MODIFIED", &kube_node("a", 6, 2));
        let mock = Mock::new(
            vec![
                ("GET /api/v1/nodes", list(5, &[a, b.clone()])),
                // Whatever came makes the list old, so that its loss is nothing strange.
                (
                    "watch=true resourceVersion=5&",
                    Answer::watch(&[told], Then::End),
                ),
                ("watch=true resourceVersion=6&", first),
                ("resourceVersionMatch=NotOlderThan", list(9, &[b])),
                ("watch=true resourceVersion=9&", quiet()),
            ],
            Answer::Silence,
        );
        let mut watch = mock.manager().watch_leases();
        let begun = Instant::now();
        assert_eq!(snapshot(&mut watch).await, ["a", "b"]);
        assert!(matches!(event(&mut watch).await, Event::Put(_)));
        let after = snapshot(&mut watch).await;
        assert_eq!(after, ["b"], "what went in the gap is gone");
        assert_eq!(begun.elapsed(), Duration::ZERO, "nothing was waited for");
        tokio::time::timeout(Duration::from_secs(1), item(&mut watch))
            .await
            .ok();
        mock.assert_used_up();
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_forgets_what_it_just_listed_is_not_asked_again_and_again() {
    let mock = Mock::new(Vec::new(), list(5, &[]));
    mock.state().prepared = (0..1000)
        .map(|_| ("watch=true", Answer::refusal(410, "Expired", "too old")))
        .collect();
    let mut watch = mock.manager().watch_leases();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        item(&mut watch).await.ok();
    }
    let tries = mock.asked("watch=true").len();
    assert!((5..60).contains(&tries), "{tries} tries in a minute");
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_the_server_asks_for_is_kept() {
    let patience = Answer::Head(429, Some(7), vec!["slow down".to_owned()], Then::End);
    let mock = Mock::new(vec![("GET /api/v1/nodes", patience)], list(5, &[]));
    let mut watch = mock.manager().watch_leases();
    let error = failure(&mut watch).await;
    assert!(
        error.is_transient() && error.to_string().contains("429"),
        "{error}"
    );
    snapshot(&mut watch).await;
    let asked = mock.asked("GET /api/v1/nodes");
    let waited = asked[1].0 - asked[0].0;
    assert!((7..10).contains(&waited.as_secs()), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_in_trouble_is_tried_ever_more_rarely_and_then_found_well() {
    let mock = Mock::new(Vec::new(), list(5, &[]));
    let broken = [
        Answer::refusal(500, "InternalError", "etcd is down"),
        Answer::refusal(503, "ServiceUnavailable", "starting"),
        Answer::Broken,
        Answer::Head(502, None, vec!["<html>".to_owned()], Then::End),
        Answer::ok(&json!({"kind": "NodeList"})),
        Answer::Head(200, None, vec!["{\"items\": [".to_owned()], Then::End),
        Answer::Head(200, None, vec!["}".to_owned()], Then::End),
    ];
    let troubles = broken.into_iter().cycle().take(28);
    mock.state().prepared = troubles.map(|it| ("GET /api/v1/nodes", it)).collect();
    let mut watch = mock.manager().watch_leases();
    for _ in 0..28 {
        let error = failure(&mut watch).await;
        assert!(error.is_transient(), "{error}");
    }
    assert!(snapshot(&mut watch).await.is_empty());
    mock.assert_used_up();
    let asked = mock.asked("GET /api/v1/nodes");
    let waits: Vec<Duration> = asked.windows(2).map(|two| two[1].0 - two[0].0).collect();
    assert!(waits[0] <= Duration::from_millis(200), "{waits:?}");
    let late = &waits[10..28];
    let range = Duration::from_secs(5)..=Duration::from_secs(10);
    assert!(late.iter().all(|wait| range.contains(wait)), "{late:?}");
    assert!(
        late.iter().any(|wait| *wait != late[0]),
        "without jitter: {late:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn silence_is_no_answer_to_anything() {
    let mock = Mock::new(Vec::new(), Answer::Silence);
    let limit = Duration::from_secs(3);
    let manager = mock.manager_with(|options| options.call_timeout(limit));
    let mut watch = manager.watch_leases();
    let request = LeaseRequest::new(NodeId::new("a").expect("an id"), LeaseAttrs::default());
    let begun = Instant::now();
    let error = manager.acquire_lease(&request).await.expect_err("silence");
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert_eq!(begun.elapsed(), limit);
    failure(&mut watch).await;
    assert_eq!(begun.elapsed(), limit * 2);
    // A list that begins and does not go on.
    let begins = vec!["{\"metadata\":{\"resourceVersion\":\"5\"},\"items\":[".to_owned()];
    let stuck = Answer::Head(200, None, begins, Then::Hang);
    mock.state()
        .prepared
        .push_back(("GET /api/v1/nodes", stuck));
    let error = failure(&mut watch).await;
    assert!(error.to_string().contains("nothing came"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_frozen_server_is_noticed_and_the_watch_goes_on_where_it_was() {
    let mock = Mock::new(
        vec![
            ("GET /api/v1/nodes", list(5, &[kube_node("a", 3, 1)])),
            ("watch=true resourceVersion=5&", quiet()),
            ("/version", Answer::ok(&json!({}))),
            // Whatever it answers, it is there.
            ("/version", Answer::refusal(403, "Forbidden", "no")),
            ("/version", Answer::Silence),
            ("watch=true resourceVersion=5&", quiet()),
        ],
        Answer::Silence,
    );
    let manager = mock.manager_with(|options| {
        let options = options.probe_every(Duration::from_secs(10));
        options.call_timeout(Duration::from_secs(2))
    });
    let mut watch = manager.watch_leases();
    assert_eq!(snapshot(&mut watch).await, ["a"]);
    let begun = Instant::now();
    let error = failure(&mut watch).await;
    assert!(error.is_transient(), "{error}");
    assert_eq!(begun.elapsed(), Duration::from_secs(32));
    let next = event(&mut watch).await;
    assert!(
        matches!(next, Event::Progress(revision) if revision.0 == 5),
        "{next:?}"
    );
    mock.assert_used_up();
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_silent_though_the_server_answers_is_not_trusted_for_ever() {
    let mock = Mock::new(
        vec![
            ("GET /api/v1/nodes", list(500, &[kube_node("a", 450, 1)])),
            ("watch=true", quiet()),
            // A store that was restored has not come to what we have seen.
            (
                "resourceVersion=450&resourceVersionMatch=NotOlderThan",
                Answer::refusal(
                    504,
                    "Timeout",
                    "Too large resource version: 450, current: 7",
                ),
            ),
            ("GET /api/v1/nodes", list(7, &[kube_node("b", 6, 1)])),
        ],
        Answer::ok(&json!({})),
    );
    let silence = Duration::from_secs(100);
    let manager = mock.manager_with(|options| options.silence(silence));
    let mut watch = manager.watch_leases();
    assert_eq!(snapshot(&mut watch).await, ["a"]);
    let begun = Instant::now();
    let error = failure(&mut watch).await;
    assert!(error.to_string().contains("silent"), "{error}");
    assert_eq!(begun.elapsed(), silence);
    assert_eq!(snapshot(&mut watch).await, ["b"]);
    mock.assert_used_up();
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_from_the_last_whole_change() {
    let whole = format!("{}\n", change("MODIFIED", &kube_node("a", 7, 2)));
    let cut = whole.replace("\"7\"", "\"8\"");
    let cut = cut[..cut.len() / 2].to_owned();
    let mock = Mock::new(
        vec![
            ("GET /api/v1/nodes", list(5, &[kube_node("a", 3, 1)])),
            (
                "watch=true resourceVersion=5&",
                Answer::Head(200, None, vec![whole, cut], Then::End),
            ),
            (
                "watch=true resourceVersion=7&",
                Answer::watch(&[bookmark(20)], Then::End),
            ),
            ("watch=true resourceVersion=20&", quiet()),
        ],
        Answer::Silence,
    );
    let mut watch = mock.manager().watch_leases();
    snapshot(&mut watch).await;
    let Event::Put(lease) = event(&mut watch).await else {
        panic!("not the change");
    };
    assert_eq!(lease.revision.0, 7);
    let error = failure(&mut watch).await;
    assert!(error.to_string().contains("cut off"), "{error}");
    for version in [7, 20] {
        let next = event(&mut watch).await;
        assert!(
            matches!(next, Event::Progress(it) if it.0 == version),
            "{next:?}"
        );
    }
    let later = tokio::time::timeout(Duration::from_secs(1), item(&mut watch));
    later.await.ok();
    mock.assert_used_up();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_every_watch_at_once_is_not_asked_again_and_again() {
    let mock = Mock::new(
        vec![("GET /api/v1/nodes", list(5, &[]))],
        Answer::watch(&[], Then::End),
    );
    let mut watch = mock.manager().watch_leases();
    snapshot(&mut watch).await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        item(&mut watch).await.ok();
    }
    let tries = mock.asked("watch=true").len();
    assert!((5..40).contains(&tries), "{tries} tries in a minute");
}

#[tokio::test(start_paused = true)]
async fn of_each_node_the_last_state_counts_and_nothing_waits_behind_another() {
    let mut lines: Vec<Value> = Vec::new();
    for n in 0_u8..100 {
        lines.push(change(
            "MODIFIED",
            &kube_node("busy", 100 + u64::from(n), n),
        ));
    }
    lines.push(change("ADDED", &kube_node("b", 300, 1)));
    lines.push(change("DELETED", &kube_node("a", 301, 1)));
    let mut bare = kube_node("stranger", 302, 1);
    bare["metadata"]["annotations"] = Value::Null;
    lines.push(change("ADDED", &bare));
    lines.push(change("DELETED", &bare));
    lines.push(change("ADDED", &kube_node("a", 303, 9)));
    let mock = Mock::new(
        vec![
            ("GET /api/v1/nodes", list(5, &[kube_node("a", 3, 1)])),
            ("watch=true", Answer::watch(&lines, Then::Hang)),
        ],
        Answer::Silence,
    );
    let mut watch = mock.manager().watch_leases();
    snapshot(&mut watch).await;
    let mut told = Vec::new();
    for _ in 0..3 {
        let Event::Put(lease) = event(&mut watch).await else {
            panic!("not a lease");
        };
        told.push((lease.key.as_str().to_owned(), lease.revision.0));
    }
    let wanted = [("busy", 199), ("b", 300), ("a", 303)];
    assert_eq!(
        told,
        wanted.map(|(name, version)| (name.to_owned(), version))
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_denied_names_the_rule_that_is_missing() {
    let message = "nodes is forbidden: User \"x\" cannot list resource \"nodes\"";
    let mock = Mock::new(
        vec![
            (
                "GET /api/v1/nodes",
                Answer::refusal(403, "Forbidden", message),
            ),
            (
                "GET /api/v1/nodes",
                Answer::refusal(401, "Unauthorized", "Unauthorized"),
            ),
        ],
        list(5, &[]),
    );
    let mut watch = mock.manager().watch_leases();
    let error = failure(&mut watch).await;
    assert!(matches!(error, Error::Denied { .. }));
    let text = error.to_string();
    assert!(
        text.contains("resources: [\"nodes\"], verbs: [\"list\"]"),
        "{text}"
    );
    let error = failure(&mut watch).await;
    assert!(
        matches!(&error, Error::Denied { reason } if reason.contains("token")),
        "{error}"
    );
    snapshot(&mut watch).await;
}

#[tokio::test(start_paused = true)]
async fn a_write_whose_answer_is_lost_is_known_again() {
    let written = |version, ip: &str| {
        let mut node = kube_node("a", version, 1);
        node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] = json!(ip);
        node["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-data"] = json!("null");
        Answer::ok(&node)
    };
    let mock = Mock::new(
        vec![
            ("GET /nodes/a", written(5, "192.0.2.1")),
            ("GET /nodes/a", written(5, "192.0.2.1")),
            ("PATCH /nodes/a/status", Answer::Silence),
            // It was done all the same, and a kubelet has written since.
            ("GET /nodes/a", written(9, "192.0.2.2")),
        ],
        Answer::Silence,
    );
    let manager = mock.manager();
    let attrs = LeaseAttrs {
        public_ip: PublicIp::v4([192, 0, 2, 1].into()),
        backend_type: Some(flannel_core::BackendType::vxlan()),
        backend_data: DualStack::default(),
    };
    let request = LeaseRequest::new(NodeId::new("a").expect("an id"), attrs);
    let mut lease = manager.acquire_lease(&request).await.expect("it stands so");
    lease.attrs.public_ip = PublicIp::v4([192, 0, 2, 2].into());
    let error = manager.renew_lease(&lease).await.expect_err("silence");
    assert!(error.is_transient(), "{error}");
    let renewed = manager.renew_lease(&lease).await.expect("it is ours");
    assert_eq!((renewed.revision.0, &renewed.attrs), (9, &lease.attrs));
    mock.assert_used_up();
}
