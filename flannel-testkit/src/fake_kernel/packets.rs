//! The host's doings with packets, set as its administrator sets them.

use flannel_core::{Family, Firewall, ReversePath, Subnet};

use super::FakeKernel;

impl FakeKernel {
    /// Switches forwarding on or off, as `sysctl -w net.ipv4.ip_forward` does (IPv4: of all
    /// devices, also of later ones). Hints at it. It is on at first.
    pub fn set_forwarding(&self, family: Family, on: bool) {
        let mut state = self.state();
        state.host.set_forwarding(family, on);
        state.tell();
    }

    /// Sets the global filter by the way back. Hints at it. It is off at first.
    pub fn set_reverse_path(&self, filter: ReversePath) {
        let mut state = self.state();
        state.host.set_reverse_path(filter);
        state.tell();
    }

    /// Puts a policy rule in front of the main table, at a place: packets to these destinations
    /// take the routes of a table, or with `None` are dropped. Hints at it.
    pub fn set_rule(&self, at: u32, to: Subnet, table: Option<u32>) {
        let mut state = self.state();
        state.host.set_rule(at, to, table);
        state.tell();
    }

    /// Deletes the policy rule at a place. Hints at it. None there: changes nothing.
    pub fn delete_rule(&self, family: Family, at: u32) {
        let mut state = self.state();
        state.host.delete_rule(family, at);
        state.tell();
    }

    /// Sets the packet filters, or that they are not known. Nobody is told of that.
    pub fn set_firewall(&self, firewall: Option<Firewall>) {
        self.state().host.policy().firewall = firewall;
    }
}
