package files

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dormouse-sandbox/dormouse/guest/account"
	filesystemv1 "github.com/dormouse-sandbox/dormouse/guest/guestapi/gen/filesystem"
)

func parent(path string) string { return filepath.Dir(path) }

// entry describes path. Of a link it gives the type and mode of what it points
// to; size, time and owner are the link's own. A link to nowhere is a link.
func entry(path string, names account.Names) (*filesystemv1.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return entryOf(path, info, names), nil
}

func entryOf(path string, info fs.FileInfo, names account.Names) *filesystemv1.EntryInfo {
	e := &filesystemv1.EntryInfo{
		Name: utf8(filepath.Base(path)), Path: utf8(path), Size: info.Size(),
		ModifiedTime: timestamppb.New(info.ModTime()), Metadata: readMetadata(path),
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = utf8(names.User(stat.Uid)), utf8(names.Group(stat.Gid))
	}
	mode := info.Mode()
	if mode&fs.ModeSymlink != 0 {
		target, pointed, err := follow(path)
		target = utf8(target)
		e.SymlinkTarget = &target
		if err == nil {
			mode = pointed.Mode()
		}
	}
	e.Type = fileType(mode)
	e.Mode = uint32(mode.Perm())
	e.Permissions = mode.String()
	return e
}

// utf8 makes a name fit for an answer. To the file system a name is bytes; one
// that is no text, as from an archive of another country, must not take a whole
// listing with it.
func utf8(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

// follow resolves a link completely. When that fails it gives the next hop.
func follow(path string) (target string, info fs.FileInfo, err error) {
	target, err = filepath.EvalSymlinks(path)
	if err == nil {
		info, err = os.Stat(target)
		return target, info, err
	}
	if hop, linkErr := os.Readlink(path); linkErr == nil {
		target = hop
		if !filepath.IsAbs(hop) {
			target = filepath.Join(filepath.Dir(path), hop)
		}
	}
	return target, nil, err
}

func fileType(mode fs.FileMode) filesystemv1.FileType {
	switch {
	case mode.IsRegular():
		return filesystemv1.FileType_FILE_TYPE_FILE
	case mode.IsDir():
		return filesystemv1.FileType_FILE_TYPE_DIRECTORY
	case mode&fs.ModeSymlink != 0:
		return filesystemv1.FileType_FILE_TYPE_SYMLINK
	}
	return filesystemv1.FileType_FILE_TYPE_UNSPECIFIED
}
