package host

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
)

// maxListed is the most that an honest agent lists at once, and maxFileBytes
// the most that it says of a single file.
const (
	maxListed    = 50_000
	maxFileBytes = 256 << 10
)

// fileCodec decodes what a guest says of its files. An entry of two bytes becomes
// one of hundreds in memory: a list is counted before it is decoded, or the
// largest message allowed would become gigabytes.
type fileCodec struct{}

func (fileCodec) Name() string { return "proto" }

func (fileCodec) Marshal(v any) ([]byte, error) {
	msg, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is no message", v)
	}
	return proto.Marshal(msg)
}

func (fileCodec) Unmarshal(data []byte, v any) error {
	msg, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is no message", v)
	}
	if _, list := v.(*filesystem.ListDirResponse); !list && len(data) > maxFileBytes {
		return fmt.Errorf("%d bytes about one file, at most %d are allowed", len(data), maxFileBytes)
	}
	fields := 0
	for rest := data; len(rest) > 0; fields++ {
		_, _, n := protowire.ConsumeField(rest)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if fields == maxListed {
			return fmt.Errorf("a list of more than %d entries", maxListed)
		}
		rest = rest[n:]
	}
	return proto.Unmarshal(data, msg)
}
