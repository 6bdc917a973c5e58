//! Tests of the book: who has a place among its tenants.

use coalmine_proto::names::TenantName;

use super::{SERVICE, book};
use crate::book::{Book, MAX_TENANTS};

/// Made-up names, as many as there are places.
fn make_up_names(book: &mut Book) {
    for number in 0..MAX_TENANTS {
        let name = format!("made-up-{number}");
        book.intern(SERVICE, &TenantName::parse(name.as_bytes()).unwrap());
    }
}

fn number(book: &mut Book, tenant: &TenantName) -> usize {
    book.intern(SERVICE, tenant) as usize
}

fn listed(count: usize) -> Vec<TenantName> {
    let names = (0..count).map(|number| format!("listed-{number}"));
    names
        .map(|name| TenantName::parse(name.as_bytes()).unwrap())
        .collect()
}

#[test]
fn made_up_names_leave_places_for_tenants_that_the_policy_lists() {
    let mut book = book();
    let listed = listed(3);
    book.keep_places(SERVICE, listed.clone());
    assert_eq!(number(&mut book, &listed[0]), 1, "0 is for those without a place");
    make_up_names(&mut book);
    // What was rolled up is read again with the same policy, and goes on as it would have.
    let mut copy = super::book();
    copy.keep_places(SERVICE, listed.clone());
    for piece in book.image() {
        copy.load(&piece).unwrap();
    }
    for book in [&mut book, &mut copy] {
        let late = TenantName::parse(b"made-up-too-late").unwrap();
        assert_eq!(number(book, &late), 0);
        let numbers = listed.iter().map(|tenant| number(book, tenant));
        assert_eq!(numbers.collect::<Vec<_>>(), [1, MAX_TENANTS - 2, MAX_TENANTS - 1]);
        assert_eq!(number(book, &late), 0);
    }
    // Without a list, all places are anybody's.
    let mut other = super::book();
    make_up_names(&mut other);
    assert_eq!(number(&mut other, &listed[0]), 0);
    let last = format!("made-up-{}", MAX_TENANTS - 2);
    assert_eq!(
        number(&mut other, &TenantName::parse(last.as_bytes()).unwrap()),
        MAX_TENANTS - 1
    );
}

#[test]
fn a_long_list_keeps_half_of_the_places() {
    let mut book = book();
    let listed = listed(MAX_TENANTS / 2 + 10);
    book.keep_places(SERVICE, listed.clone());
    make_up_names(&mut book);
    let numbers = listed.iter().map(|tenant| number(&mut book, tenant));
    assert_eq!(numbers.filter(|number| *number == 0).count(), 10);
}
