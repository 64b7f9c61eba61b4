//! The real gateway on the real helper: all that speak to it, once.

use rvpn_lab::topology::{UP4, UP6};
use rvpn_lab::tunnel_client::{DIALECTS, Session, Speech, Target, on};
use rvpn_lab::{Gateway, Helper, Lab};

#[test]
fn every_kind_of_client_pings_through_both_families() {
    let lab = Lab::new();
    let helper = Helper::serving(&lab, "");
    let mut gateway = Gateway::start(&lab, &helper, DIALECTS);
    let phone = lab.client("phone", 10);
    let native = [true, false].map(|offload| Speech::Native { offload });
    on(&phone, async || {
        for speech in native.into_iter().chain(Speech::OLDER) {
            let target = Target::of(&gateway);
            let token = gateway.token(speech.kind());
            let mut session = Session::open(&target, speech, &token).await;
            session.ping(UP4, 7, 1).await;
            if speech.has_v6() {
                session.ping(UP6, 7, 2).await;
            }
            assert_eq!(gateway.sessions()[0]["account"], speech.kind());
        }
    });
    gateway.restart();
    assert_eq!(gateway.fingerprint().len(), 64);
    assert!(gateway.stop().success());
}
