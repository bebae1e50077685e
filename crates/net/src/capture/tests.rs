//! Golden rulesets of the capture plan.

use super::*;

fn from(args: &str) -> Config {
    Config::from_args(&args.split(' ').collect::<Vec<_>>()).expect("flags")
}

const INJECTED: &str = "-p 15001 -z 15006 -u 1337 -m REDIRECT -i * -x \"\" -b * -d 15090,15021,15020";

#[test]
fn the_injected_flags_give_istios_order() {
    insta::assert_snapshot!(plan(&from(INJECTED)));
}

#[test]
fn all_options_keep_the_order() {
    let config = from(
        "-p 15001 -z 15006 -u 1337 -g 1337 -m REDIRECT -i 10.0.0.0/8,2001:db8::/32 -x 10.9.0.0/16 -b 80,443 -d 9 -q 3306 -o 53,25 -k vm0 -c eth9 --drop-invalid",
    );
    insta::assert_snapshot!(plan(&config));
}

#[test]
fn empty_lists_capture_nothing() {
    let config = Config::from_args(&["-i", "", "-b", ""]).expect("flags");
    let text = plan(&config);
    assert!(!text.contains("jump inbound"), "{text}");
    assert!(!text.contains("goto to_outbound"), "{text}");
}

#[test]
fn a_loopback_range_in_the_include_list_captures_the_applications_loopback_traffic() {
    assert!(plan(&from(INJECTED)).contains("oifname \"lo\" meta skuid != 1337 return"));
    assert!(!plan(&from("-i 127.1.2.3/32")).contains("meta skuid != 1337"));
}

#[test]
fn mistakes_are_named() {
    let error = |args: &[&str]| Config::from_args(args).expect_err("must fail").to_string();
    assert_eq!(error(&["-d", "0"]), "flag -d: \"0\" is no port number (1 to 65535)");
    assert_eq!(
        error(&["-x", "*"]),
        "flag -x: \"*\" is no address range such as 10.0.0.0/8"
    );
    assert_eq!(
        error(&["-c", "a\" accept"]),
        "flag -c: \"a\\\" accept\" is no interface name"
    );
    assert_eq!(
        error(&["-m", "TPROXY"]),
        "flag -m: \"TPROXY\" is not supported: only REDIRECT is"
    );
    assert_eq!(error(&["-p"]), "flag -p needs a value");
    assert!(error(&["--prot", "1"]).starts_with("unknown flag --prot"));
    assert!(error(&["-u", ""]).contains("would loop"));
}
