//! What backends publish with a lease.

use flannel_backend_vxlan::VxlanData;
use flannel_core::BackendData;
use serde_json::Value;

pub(crate) const WORDS: &[&str] = &[
    "\"VNI\"",
    "\"VtepMAC\"",
    "\"vni\"",
    "\"c6:d2:32:6f:8f:44\"",
    "\"c6-d2-32-6f-8f-44\"",
    "\"c6d2.326f.8f44\"",
    "\"00:00:00:00:00:00\"",
    "\"ff:ff:ff:ff:ff:ff\"",
    "null",
    "4294967295",
    "4294967296",
    "-1",
    "1.0",
    "1e999",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\\\"",
    "\\\\",
    "\\u0000",
    "\\ud800",
];

pub(crate) fn backend_data(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let Ok(data) = BackendData::from_json(&text) else {
        return false;
    };
    let compact = data.as_json();
    assert!(compact.len() <= text.len(), "it grew");
    assert!(compact.len() <= BackendData::MAX_LEN);
    assert_eq!(BackendData::from_json(compact).as_ref(), Ok(&data));
    assert_eq!(serde_json::to_string(&data).ok().as_deref(), Some(compact));
    let (was, is) = (value(&text), value(compact));
    assert_eq!(was, is, "more than white space is gone");
    if let Ok(vxlan) = VxlanData::decode(&data) {
        assert!(vxlan.vtep_mac.is_unicast(), "{}", vxlan.vtep_mac);
        let written = vxlan.encode().expect("it has a form");
        // Go flannel finds its old address by cutting the text here.
        let expected = format!(
            "{{\"VNI\":{},\"VtepMAC\":\"{}\"}}",
            vxlan.vni, vxlan.vtep_mac
        );
        assert_eq!(written.as_json(), expected);
        assert_eq!(VxlanData::decode(&written), Ok(vxlan));
    }
    true
}

/// A JSON text as a value; `None` for what is JSON and no value of serde_json, such as half a
/// surrogate pair, a number that no float holds or deep nesting.
fn value(text: &str) -> Option<Value> {
    serde_json::from_str(text).ok()
}

/// Backend data that is the same but for how its strings are escaped.
pub(crate) fn same_data(one: &BackendData, other: &BackendData) {
    assert_eq!(value(one.as_json()), value(other.as_json()));
}
