//! The client protocol: golden frames both ways, round trips, and decoders against random and mutated bytes.
#![allow(clippy::unwrap_used, missing_docs)]

use bytes::Bytes;
use patchbay_protocol::client::reply::{ConnectResult, Publication, Push, RpcResult, SubscribeResult};
use patchbay_protocol::client::request::{HistoryRequest, RpcRequest, StreamPosition, SubscribeRequest};
use patchbay_protocol::client::{Command, DecodeError, Encoding, Reply, json, protobuf};
use proptest::prelude::*;

#[test]
fn the_first_frame_of_an_sdk_decodes() {
    let frame = "{\"connect\":{\"token\":\"t\",\"name\":\"js\",\"data\":{\"a\": 1}},\"id\":1}\n{\"subscribe\":{\"channel\":\"c\",\"recover\":true,\"epoch\":\"E\",\"offset\":7,\"flag\":1,\"tf\":{\"x\":[1]}},\"id\":2}";
    let commands = json::decode_commands(frame.as_bytes()).unwrap();
    assert_eq!(commands.len(), 2);
    let connect = commands[0].connect.as_ref().unwrap();
    assert_eq!((connect.token.as_str(), &connect.data[..]), ("t", &b"{\"a\": 1}"[..]));
    let subscribe = commands[1].subscribe.as_ref().unwrap();
    assert_eq!((subscribe.recover, subscribe.offset, subscribe.flag), (true, 7, 1));
    assert!(json::decode_commands(b"{}").unwrap()[0].is_pong());
}

#[test]
fn golden_protobuf_frames() {
    let command = Command {
        id: 2,
        subscribe: Some(Box::new(SubscribeRequest {
            channel: "c".into(),
            recover: true,
            epoch: "E".into(),
            offset: 7,
            flag: 1,
            ..Default::default()
        })),
        ..Default::default()
    };
    let golden = [0x10, 0x08, 2, 0x2a, 12, 0x0a, 1, b'c', 0x18, 1, 0x32, 1, b'E', 0x38, 7, 0x70, 1];
    assert_eq!(protobuf::encode_command(&command)[..], golden);
    assert_eq!(protobuf::decode_commands(&Bytes::from(golden.to_vec())).unwrap(), [command]);
    assert!(protobuf::decode_commands(&Bytes::from_static(&[0])).unwrap()[0].is_pong());
    let publication = protobuf::encode_publication("c", &Bytes::from_static(b"{}"), 300);
    assert_eq!(
        publication[..],
        [14, 0x22, 12, 0x12, 1, b'c', 0x22, 7, 0x22, 2, b'{', b'}', 0x30, 0xac, 0x02]
    );
}

#[test]
fn golden_json_frames() {
    let reply = |r: Reply| String::from_utf8(Encoding::Json.encode_reply(&r).unwrap().to_vec()).unwrap();
    assert_eq!(reply(Reply::default()), "{}");
    assert_eq!(
        reply(Reply { id: 4, unsubscribe: Some(Default::default()), ..Default::default() }),
        r#"{"id":4,"unsubscribe":{}}"#
    );
    let connect = ConnectResult { client: "x".into(), ping: 25, pong: true, ..Default::default() };
    assert_eq!(
        reply(Reply { id: 1, connect: Some(connect), ..Default::default() }),
        r#"{"id":1,"connect":{"client":"x","ping":25,"pong":true}}"#
    );
    let pretty = RpcResult { data: Bytes::from_static(b"{\n \"a\": 1\n}") };
    assert_eq!(
        reply(Reply { id: 3, rpc: Some(pretty), ..Default::default() }),
        r#"{"id":3,"rpc":{"data":{"a":1}}}"#
    );
    let by_hand = json::encode_publication("conversation:x", br#"{"a":1}"#, 9);
    let publication =
        Publication { data: Bytes::from_static(br#"{"a":1}"#), offset: 9, ..Default::default() };
    let push =
        Push { channel: "conversation:x".into(), publication: Some(publication), ..Default::default() };
    assert_eq!(
        by_hand,
        Encoding::Json.encode_reply(&Reply { push: Some(push), ..Default::default() }).unwrap()
    );
}

#[test]
fn bytes_that_are_no_json_are_not_embedded() {
    let rpc = RpcResult { data: Bytes::from_static(&[0xff, 0]) };
    assert!(Encoding::Json.encode_reply(&Reply { id: 1, rpc: Some(rpc), ..Default::default() }).is_err());
}

#[test]
fn limits_are_part_of_the_decoder() {
    let long = format!(r#"{{"id":1,"send":{{"data":"{}"}}}}"#, "x".repeat(70_000));
    assert_eq!(json::decode_commands(long.as_bytes()), Err(DecodeError::TooLarge));
    let many = "{}\n".repeat(5000);
    assert_eq!(json::decode_commands(many.as_bytes()), Err(DecodeError::TooMany));
    let deep =
        format!(r#"{{"id":1,"rpc":{{"data":{}1{},"method":"m"}}}}"#, "[".repeat(30_000), "]".repeat(30_000));
    let _ = json::decode_commands(deep.as_bytes());
    let mut connect = vec![];
    for n in 0..100u8 {
        connect.extend([0x1a, 3, 0x0a, 1, n % 128]);
    }
    let mut command = vec![0x22, 0xf4, 0x03];
    command.extend(connect);
    let mut frame = vec![0xf7, 0x03];
    frame.extend(command);
    assert_eq!(protobuf::decode_commands(&Bytes::from(frame)), Err(DecodeError::TooMany));
    assert_eq!(protobuf::decode_commands(&Bytes::from_static(&[0xff; 11])), Err(DecodeError::Malformed));
    assert_eq!(protobuf::decode_commands(&Bytes::from_static(&[5, 1])), Err(DecodeError::Malformed));
}

fn any_command() -> impl Strategy<Value = Command> {
    (any::<u32>(), "[a-z:]{0,20}", any::<bool>(), 0u64..1 << 50, "[A-Z]{0,8}", any::<i32>()).prop_map(
        |(id, text, flag, offset, epoch, limit)| Command {
            id,
            subscribe: flag.then(|| {
                Box::new(SubscribeRequest {
                    channel: text.clone(),
                    recover: flag,
                    offset,
                    epoch: epoch.clone(),
                    ..Default::default()
                })
            }),
            history: Some(Box::new(HistoryRequest {
                channel: text.clone(),
                limit,
                since: Some(StreamPosition { offset, epoch }),
                reverse: flag,
            })),
            rpc: Some(Box::new(RpcRequest { data: Bytes::from_static(br#"{"a":[1,"x"]}"#), method: text })),
            ..Default::default()
        },
    )
}

proptest! {
    #[test]
    fn commands_round_trip(command in any_command()) {
        let text = json::encode_command(&command).unwrap();
        prop_assert_eq!(&json::decode_commands(&text).unwrap()[0], &command);
        let binary = protobuf::encode_command(&command);
        prop_assert_eq!(&protobuf::decode_commands(&binary).unwrap()[0], &command);
    }

    #[test]
    fn replies_round_trip(id in any::<u32>(), offset in 0u64..1 << 50, recovered in any::<bool>(), n in 0usize..4) {
        let publication = Publication { data: Bytes::from_static(br#"{"seq":1}"#), offset, ..Default::default() };
        let reply = Reply { id, subscribe: Some(SubscribeResult { recovered, offset, publications: vec![publication; n], ..Default::default() }), ..Default::default() };
        prop_assert_eq!(&json::decode_replies(&json::encode_reply(&reply).unwrap()).unwrap()[0], &reply);
        prop_assert_eq!(&protobuf::decode_replies(&protobuf::encode_reply(&reply)).unwrap()[0], &reply);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let bytes = Bytes::from(bytes);
        let _ = json::decode_commands(&bytes);
        let _ = protobuf::decode_commands(&bytes);
        let _ = protobuf::decode_replies(&bytes);
        let _ = json::decode_replies(&bytes);
    }

    #[test]
    fn mutated_frames_never_panic(command in any_command(), at in any::<usize>(), with in any::<u8>(), cut in any::<usize>()) {
        for frame in [json::encode_command(&command).unwrap(), protobuf::encode_command(&command)] {
            let mut bytes = frame.to_vec();
            let n = bytes.len();
            bytes[at % n] = with;
            bytes.truncate(cut % (n + 1));
            let bytes = Bytes::from(bytes);
            let _ = json::decode_commands(&bytes);
            let _ = protobuf::decode_commands(&bytes);
        }
    }
}
