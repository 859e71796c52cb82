//! Messages and expressions of nf_tables that nftnl 0.9 lacks: sets of intervals, verdict maps and timeouts, named
//! counters, and expressions that use another register than the first.

#![expect(unsafe_code, reason = "libnftnl takes pointers")]

use nftnl::{
    MsgType, NlMsg, Rule, Table,
    expr::Expression as NftnlExpression,
    nftnl_sys::{self as sys, libc},
};
use std::{
    ffi::{CStr, CString, c_char, c_void},
    ptr::NonNull,
};

/// Bytes of a message that are certainly left for elements: `nla_len` has 16 bits, and so has their list's.
pub(crate) const ELEMENTS_IN_A_MESSAGE: usize = 400;

const NFT_OBJECT_COUNTER: u32 = 1;

/// An expression by its name in the kernel and its attributes (`NFTNL_EXPR_…`).
#[derive(Debug)]
pub(crate) struct Expression {
    pub(crate) name: &'static CStr,
    pub(crate) attributes: Vec<(u32, Value)>,
}

/// An attribute's value.
#[derive(Debug)]
pub(crate) enum Value {
    U32(u32),
    Text(CString),
}

impl NftnlExpression for Expression {
    fn to_expr(&self, _rule: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        // SAFETY: the name ends with NUL; libnftnl copies what it is given, and knows which attribute has which type.
        unsafe {
            let expression = allocated(sys::nftnl_expr_alloc(self.name.as_ptr()));
            for (attribute, value) in &self.attributes {
                let (to, attribute) = (expression.as_ptr(), *attribute as u16);
                match value {
                    Value::U32(value) => sys::nftnl_expr_set_u32(to, attribute, *value),
                    Value::Text(text) => _ = sys::nftnl_expr_set_str(to, attribute, text.as_ptr()),
                }
            }
            expression
        }
    }
}

/// A named set or map.
pub(crate) struct Set<'a> {
    pub(crate) table: &'a Table,
    pub(crate) name: &'a CStr,
    /// `NFT_SET_…`
    pub(crate) flags: u32,
    /// How the nft program shows keys.
    pub(crate) key_type: u32,
    /// Bytes of a key.
    pub(crate) key_len: u32,
    /// Bytes of each part of a concatenated key; empty for a simple one.
    pub(crate) key_parts: &'a [u8],
    /// Of a map to values: how the nft program shows them, and their bytes. Other maps lead to verdicts.
    pub(crate) data: Option<(u32, u32)>,
    /// Distinct among the sets of a batch.
    pub(crate) id: u32,
}

/// Adds the set where it is absent, or deletes it.
// SAFETY: a set without elements takes less than a page.
unsafe impl NlMsg for Set<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        // SAFETY: the caller promises room; libnftnl copies what it is given.
        unsafe {
            let set = self.alloc();
            let raw = set.as_ptr();
            sys::nftnl_set_set_u32(raw, sys::NFTNL_SET_ID as u16, self.id);
            sys::nftnl_set_set_u32(raw, sys::NFTNL_SET_FLAGS as u16, self.flags);
            sys::nftnl_set_set_u32(raw, sys::NFTNL_SET_KEY_TYPE as u16, self.key_type);
            sys::nftnl_set_set_u32(raw, sys::NFTNL_SET_KEY_LEN as u16, self.key_len);
            if !self.key_parts.is_empty() {
                let (parts, len) = (self.key_parts.as_ptr().cast(), self.key_parts.len() as u32);
                sys::nftnl_set_set_data(raw, sys::NFTNL_SET_DESC_CONCAT as u16, parts, len);
            }
            if self.flags & libc::NFT_SET_MAP as u32 != 0 {
                let (kind, len) = self.data.unwrap_or((libc::NFT_DATA_VERDICT, 0));
                sys::nftnl_set_set_u32(raw, sys::NFTNL_SET_DATA_TYPE as u16, kind);
                sys::nftnl_set_set_u32(raw, sys::NFTNL_SET_DATA_LEN as u16, len);
            }
            let message = (libc::NFT_MSG_NEWSET, libc::NFT_MSG_DELSET);
            let header = header(buffer, seq, kind, message, self.table);
            sys::nftnl_set_nlmsg_build_payload(header, raw);
            sys::nftnl_set_free(raw);
        }
    }
}

impl Set<'_> {
    /// Only with what names it.
    unsafe fn alloc(&self) -> NonNull<sys::nftnl_set> {
        // SAFETY: names end with NUL, and are copied.
        unsafe {
            let set = allocated(sys::nftnl_set_alloc());
            sys::nftnl_set_set_str(set.as_ptr(), sys::NFTNL_SET_TABLE as u16, self.table.get_name().as_ptr());
            sys::nftnl_set_set_str(set.as_ptr(), sys::NFTNL_SET_NAME as u16, self.name.as_ptr());
            set
        }
    }
}

/// An element of a set or map.
#[derive(Debug)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    /// The last key of an interval.
    pub(crate) key_end: Option<Vec<u8>>,
    /// Of a map: to which chain it jumps.
    pub(crate) jump: Option<CString>,
    /// Of a map: its value.
    pub(crate) data: Option<Vec<u8>>,
    /// Milliseconds after which it is gone.
    pub(crate) timeout_ms: Option<u64>,
}

/// Elements of a set, at most [`ELEMENTS_IN_A_MESSAGE`].
pub(crate) struct Elements<'a> {
    pub(crate) set: &'a Set<'a>,
    pub(crate) elements: &'a [Element],
}

/// Adds elements, whether they are there or not, or deletes those that are.
// SAFETY: an element takes less than 160 bytes.
unsafe impl NlMsg for Elements<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        // SAFETY: the caller promises room; libnftnl copies keys, and frees elements with their set.
        unsafe {
            let set = self.set.alloc();
            for element in self.elements {
                sys::nftnl_set_elem_add(set.as_ptr(), element.alloc().as_ptr());
            }
            let message = (libc::NFT_MSG_NEWSETELEM, libc::NFT_MSG_DELSETELEM);
            let header = header(buffer, seq, kind, message, self.set.table);
            sys::nftnl_set_elems_nlmsg_build_payload(header, set.as_ptr());
            sys::nftnl_set_free(set.as_ptr());
        }
    }
}

impl Element {
    unsafe fn alloc(&self) -> NonNull<sys::nftnl_set_elem> {
        // SAFETY: pointers are to live values of the lengths that are given, and what they point at is copied.
        unsafe {
            let element = allocated(sys::nftnl_set_elem_alloc());
            let raw = element.as_ptr();
            let (key, len) = (self.key.as_ptr().cast(), self.key.len() as u32);
            sys::nftnl_set_elem_set(raw, sys::NFTNL_SET_ELEM_KEY as u16, key, len);
            if let Some(end) = &self.key_end {
                let (end, len) = (end.as_ptr().cast(), end.len() as u32);
                sys::nftnl_set_elem_set(raw, sys::NFTNL_SET_ELEM_KEY_END as u16, end, len);
            }
            if let Some(chain) = &self.jump {
                sys::nftnl_set_elem_set_u32(raw, sys::NFTNL_SET_ELEM_VERDICT as u16, libc::NFT_JUMP as u32);
                sys::nftnl_set_elem_set_str(raw, sys::NFTNL_SET_ELEM_CHAIN as u16, chain.as_ptr());
            }
            if let Some(data) = &self.data {
                let (data, len) = (data.as_ptr().cast(), data.len() as u32);
                sys::nftnl_set_elem_set(raw, sys::NFTNL_SET_ELEM_DATA as u16, data, len);
            }
            if let Some(milliseconds) = self.timeout_ms {
                sys::nftnl_set_elem_set_u64(raw, sys::NFTNL_SET_ELEM_TIMEOUT as u16, milliseconds);
            }
            element
        }
    }
}

/// A named counter.
pub(crate) struct Counter<'a> {
    pub(crate) table: &'a Table,
    pub(crate) name: &'a CStr,
}

/// Adds the counter, which goes on where it is if it is there, or deletes it.
// SAFETY: it takes less than a page.
unsafe impl NlMsg for Counter<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        // SAFETY: the caller promises room; names end with NUL and are copied.
        unsafe {
            let object = allocated(sys::nftnl_obj_alloc());
            let raw = object.as_ptr();
            sys::nftnl_obj_set_str(raw, sys::NFTNL_OBJ_TABLE as u16, self.table.get_name().as_ptr());
            sys::nftnl_obj_set_str(raw, sys::NFTNL_OBJ_NAME as u16, self.name.as_ptr());
            sys::nftnl_obj_set_u32(raw, sys::NFTNL_OBJ_TYPE as u16, NFT_OBJECT_COUNTER);
            let message = (libc::NFT_MSG_NEWOBJ, libc::NFT_MSG_DELOBJ);
            let header = header(buffer, seq, kind, message, self.table);
            sys::nftnl_obj_nlmsg_build_payload(header, raw);
            sys::nftnl_obj_free(raw);
        }
    }
}

/// Every rule of a chain, or of a whole table; can only be deleted.
pub(crate) struct Rules<'a> {
    pub(crate) table: &'a Table,
    pub(crate) chain: Option<&'a CStr>,
}

// SAFETY: it takes less than a page.
unsafe impl NlMsg for Rules<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        // SAFETY: the caller promises room; names end with NUL and are copied.
        unsafe {
            let rule = allocated(sys::nftnl_rule_alloc());
            let raw = rule.as_ptr();
            sys::nftnl_rule_set_str(raw, sys::NFTNL_RULE_TABLE as u16, self.table.get_name().as_ptr());
            if let Some(chain) = self.chain {
                sys::nftnl_rule_set_str(raw, sys::NFTNL_RULE_CHAIN as u16, chain.as_ptr());
            }
            let message = (libc::NFT_MSG_NEWRULE, libc::NFT_MSG_DELRULE);
            let header = header(buffer, seq, kind, message, self.table);
            sys::nftnl_rule_nlmsg_build_payload(header, raw);
            sys::nftnl_rule_free(raw);
        }
    }
}

/// # Safety
/// `buffer` has room for a message.
unsafe fn header(
    buffer: *mut c_void,
    seq: u32,
    kind: MsgType,
    (add, delete): (libc::c_int, libc::c_int),
    table: &Table,
) -> *mut libc::nlmsghdr {
    let (message, flags) = match kind {
        MsgType::Add => (add, libc::NLM_F_CREATE | libc::NLM_F_ACK),
        MsgType::Del => (delete, libc::NLM_F_ACK),
    };
    let family = table.get_family() as u16;
    // SAFETY: as promised by the caller.
    unsafe { sys::nftnl_nlmsg_build_hdr(buffer.cast::<c_char>(), message as u16, family, flags as u16, seq) }
}

/// What malloc gave.
fn allocated<T>(pointer: *mut T) -> NonNull<T> {
    // As with Rust's own allocations, there is nothing sensible to do without memory.
    NonNull::new(pointer).unwrap_or_else(|| std::process::abort())
}
