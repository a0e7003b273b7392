use super::*;

#[test]
fn queries_are_decoded() {
    let read = |query: &str| parameters(query).collect::<Vec<_>>();
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(read(""), vec![]);
    assert_eq!(read("level=a%3Adebug,b=off&reset"), vec![pair("level", "a:debug,b=off"), pair("reset", "")]);
    assert_eq!(read("reset=&a+b=%E2%82%AC"), vec![pair("reset", ""), pair("a b", "€")]);
}

#[test]
fn what_is_not_percent_encoded_text_is_refused() {
    for bad in ["%", "%4", "%zz", "%+1", "%ff", "1%"] {
        let profile = profile_parameters(&format!("seconds={bad}")).unwrap_err();
        assert!(matches!(profile, BadQuery::Number { .. }), "{bad}: {profile}");
        let heap = activation(&format!("activate={bad}")).unwrap_err();
        assert!(matches!(heap, BadQuery::Flag { .. }), "{bad}: {heap}");
        let unknown = activation(&format!("{bad}=true")).unwrap_err();
        assert!(matches!(unknown, BadQuery::Unknown(_)), "{bad}: {unknown}");
    }
}

#[test]
fn profiles_have_bounds() {
    let read = |query: &str| profile_parameters(query).map_err(|error| error.to_string());
    assert_eq!(read(""), Ok((Duration::from_secs(10), 100)));
    assert_eq!(read("seconds=300&frequency=1000"), Ok((Duration::from_secs(300), 1000)));
    assert_eq!(read("seconds=301"), Err("seconds=301: use a number from 1 to 300".to_owned()));
    assert_eq!(read("frequency=0"), Err("frequency=0: use a number from 1 to 1000".to_owned()));
    assert_eq!(read("minutes=1"), Err("\"minutes\" is not known here".to_owned()));
}
