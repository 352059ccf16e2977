//! Caches that cannot be read or written, issuers that answer anything, and refreshes: nothing is lost, and one sentence
//! says why.

use valetkey::sandbox::Fault;

use super::Home;

const DEVICE: &[&str] = &["login", "--device-auth"];

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_issuer_answers_a_devices_code_is_redeemed_once() {
    let table = [
        (Fault::DropBefore, "the issuer could not be reached"),
        (Fault::DropAfter, "the issuer could not be reached"),
        (Fault::Garbage, "the issuer's answer cannot be used"),
        (Fault::RateLimited(7), "the issuer refused: rate_limit_exceeded"),
        (Fault::Refuse("invalid_grant"), "the issuer refused: invalid_grant"),
        (Fault::Status(500), "the issuer refused: server_error"),
    ];
    for (fault, sentence) in table {
        let home = Home::new().await;
        home.signed_in();
        let before = home.cache();
        home.issuer().script(fault);
        home.issuer().approve_device();
        home.run(DEVICE).await.failed(1, sentence, "try again");
        assert_eq!((home.issuer().polls().len(), home.issuer().posts()), (1, 1), "{fault:?}");
        assert_eq!((home.cache(), home.issuer().revokes()), (before, 0), "{fault:?}");
    }
}
