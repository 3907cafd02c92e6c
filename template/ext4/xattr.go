package ext4

const (
	xattrMagic   = 0xEA020000
	xattrHeader  = 32 // of a block
	xattrEntry   = 16
	goodOldInode = 128
)

// prefixes are how the beginnings of names are numbered.
var prefixes = map[byte]string{
	1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security.", 7: "system.",
}

// attributes reads what is behind the inode and what is in a block of its own.
func (f *FS) attributes(i inode) (map[string]string, error) {
	out := map[string]string{}
	if extra := i.extra(); extra > 0 && goodOldInode+extra+4 <= len(i.raw) {
		area := i.raw[goodOldInode+extra:]
		if le.Uint32(area) == xattrMagic {
			if err := parseAttributes(i, area[4:], area[4:], out); err != nil {
				return nil, err
			}
		}
	}
	if at := i.aclAt(); at != 0 {
		block, err := f.block(at)
		if err != nil {
			return nil, err
		}
		if le.Uint32(block) != xattrMagic {
			return nil, invalid("inode %d has broken attributes", i.number)
		}
		if err := parseAttributes(i, block[xattrHeader:], block, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// parseAttributes reads a list of entries, whose values lie at offsets from the
// beginning of values.
func parseAttributes(i inode, list, values []byte, out map[string]string) error {
	for len(list) >= 4 && le.Uint32(list) != 0 {
		if len(list) < xattrEntry {
			return invalid("inode %d has broken attributes", i.number)
		}
		name, size := int(list[0]), int64(le.Uint32(list[8:]))
		begin := int64(le.Uint16(list[2:]))
		if xattrEntry+name > len(list) || begin+size > int64(len(values)) || le.Uint32(list[4:]) != 0 {
			return invalid("inode %d has broken attributes", i.number)
		}
		if prefix, ok := prefixes[list[1]]; ok {
			out[prefix+string(list[xattrEntry:xattrEntry+name])] = string(values[begin : begin+size])
		}
		list = list[min((xattrEntry+name+3)&^3, len(list)):]
	}
	return nil
}
