package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
)

// buildFlags are those of template build.
type buildFlags struct {
	name, file, target, image, archive, rootfs, suite string
	args, packages                                    []string
	size                                              sizeFlag
	registry, username                                string
	passwordStdin                                     bool
}

func newTemplateBuildCommand() *cobra.Command {
	var f buildFlags
	cmd := &cobra.Command{
		Use:   "build [DIR]",
		Short: "Build a template from a Dockerfile, an image, packages or a root file system",
		Long: `Build a template and print its name once it is there; its log goes to standard
error.

DIR holds a Dockerfile; what its .dockerignore names is not sent. Without one,
--image names an image in a registry, --packages Debian packages, --archive a
file that "docker save" has written or an OCI archive, and --rootfs a tar file of
a root file system. Tar files may be compressed with gzip, zstd, xz or bzip2.
RUN steps run in a sandbox of their own; steps that were done before are not
done again.`,
		Example: "  dormouse template build . -t app\n  dormouse template build --image debian:12 -t debian\n" +
			"  dormouse template build --packages python3,git,g++ -t tools\n" +
			"  docker save app | dormouse template build --archive - -t app\n" +
			"  dormouse template build . -t app --registry ghcr.io --username me --password-stdin <token",
		Args: args(cobra.MaximumNArgs(1)),
		RunE: verb(func(cmd *cobra.Command, c *client.Client, given []string) error {
			req, source, err := f.request(cmd, given)
			if err != nil {
				return err
			}
			upload, err := source()
			if err != nil {
				return err
			}
			if upload != nil {
				defer func() { _ = upload.Close() }() // read only
			}
			return buildTemplate(cmd, c, req, upload)
		}),
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.name, "tag", "t", "", "name of the template (default: the directory's)")
	flags.StringVarP(&f.file, "file", "f", "", "path of the Dockerfile in DIR (default: Dockerfile)")
	flags.StringVar(&f.target, "target", "", "stage to build (default: the last one)")
	flags.StringArrayVar(&f.args, "build-arg", nil, "NAME=VALUE for an ARG; may be repeated")
	flags.StringVar(&f.image, "image", "", "an image in a registry; with --archive: which of its images")
	flags.StringVar(&f.archive, "archive", "", "archive of an image, - for standard input")
	flags.StringVar(&f.rootfs, "rootfs", "", "tar file of a root file system, - for standard input")
	flags.StringSliceVar(&f.packages, "packages", nil, "Debian packages, separated by commas; may be repeated")
	flags.StringVar(&f.suite, "suite", "", "Debian suite of the packages (default: bookworm)")
	flags.Var(&f.size, "size", "size of the file system, such as 2GiB (default: what fits, with some room)")
	flags.StringVar(&f.registry, "registry", "index.docker.io", "registry that --username is for")
	flags.StringVar(&f.username, "username", "", "user of the registry")
	flags.BoolVar(&f.passwordStdin, "password-stdin", false, "read the password for the registry from standard input")
	return cmd
}

// request says what to build, and how to open what is uploaded.
func (f *buildFlags) request(cmd *cobra.Command, given []string) (api.BuildTemplate, func() (io.ReadCloser, error), error) {
	req := api.BuildTemplate{Name: f.name, ImageMiB: f.size.MiB}
	none := func() (io.ReadCloser, error) { return nil, nil }
	sources := len(given)
	for _, s := range []string{f.archive, f.rootfs} {
		if s != "" {
			sources++
		}
	}
	if f.image != "" && f.archive == "" {
		sources++
	}
	if len(f.packages) > 0 {
		sources++
	}
	if sources != 1 {
		return req, none, usage(cmd, "give one source: DIR, --image, --packages, --archive or --rootfs")
	}
	if f.suite != "" && len(f.packages) == 0 {
		return req, none, usage(cmd, "--suite is for --packages")
	}
	if err := f.login(cmd, &req); err != nil {
		return req, none, err
	}
	open := none
	switch {
	case f.archive != "":
		req.Source, req.Image = api.SourceArchive, f.image
		open = func() (io.ReadCloser, error) { return openFile(cmd, f.archive) }
	case f.rootfs != "":
		req.Source = api.SourceRootFS
		open = func() (io.ReadCloser, error) { return openFile(cmd, f.rootfs) }
	case len(f.packages) > 0:
		req.Source, req.Suite, req.Packages = api.SourcePackages, f.suite, f.packages
	case f.image != "":
		req.Source, req.Image = api.SourceImage, f.image
	default:
		if err := f.dockerfile(cmd, given[0], &req); err != nil {
			return req, none, err
		}
		open = func() (io.ReadCloser, error) { return packContext(given[0], req.Dockerfile) }
	}
	if req.Name == "" {
		return req, none, usage(cmd, "name the template: --tag NAME")
	}
	return req, open, nil
}

func (f *buildFlags) dockerfile(cmd *cobra.Command, dir string, req *api.BuildTemplate) error {
	req.Source, req.Dockerfile, req.Target = api.SourceDockerfile, f.file, f.target
	if req.Dockerfile == "" {
		req.Dockerfile = "Dockerfile"
	}
	if req.Name == "" {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		req.Name = filepath.Base(abs)
	}
	for _, arg := range f.args {
		name, value, ok := strings.Cut(arg, "=")
		if !ok || name == "" {
			return usage(cmd, "--build-arg is %q, must be NAME=VALUE", arg)
		}
		if req.Args == nil {
			req.Args = map[string]string{}
		}
		req.Args[name] = value
	}
	return nil
}

// login reads the password for a registry. It is never an argument, which others
// on the machine could read.
func (f *buildFlags) login(cmd *cobra.Command, req *api.BuildTemplate) error {
	if f.username == "" && !f.passwordStdin {
		return nil
	}
	if f.username == "" || !f.passwordStdin || f.archive == "-" || f.rootfs == "-" {
		return usage(cmd, "--username and --password-stdin belong together, and nothing else can be on standard input then")
	}
	line, err := bufio.NewReader(io.LimitReader(cmd.InOrStdin(), 64<<10)).ReadString('\n')
	if err != nil && line == "" {
		return fmt.Errorf("read the password from standard input: %w", err)
	}
	req.Registries = map[string]api.RegistryLogin{f.registry: {Username: f.username, Password: strings.TrimRight(line, "\r\n")}}
	return nil
}

func openFile(cmd *cobra.Command, path string) (io.ReadCloser, error) {
	if path == "-" {
		return io.NopCloser(cmd.InOrStdin()), nil
	}
	return os.Open(path)
}

func buildTemplate(cmd *cobra.Command, c *client.Client, req api.BuildTemplate, upload io.Reader) error {
	log := buildLog{out: cmd.ErrOrStderr()}
	made, err := c.BuildTemplate(cmd.Context(), req, upload, log.event)
	if err != nil {
		return err
	}
	if asJSON(cmd) {
		return printJSON(cmd, made)
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), made.Name)
	return err
}

// buildLog prints each step once, and under it its lines.
type buildLog struct {
	out  io.Writer
	step string
}

func (l *buildLog) event(e api.BuildEvent) {
	if e.Step != "" && e.Step != l.step {
		l.step = e.Step
		_, _ = fmt.Fprintln(l.out, printable(e.Step)) // news only
	}
	if e.Line != "" {
		_, _ = fmt.Fprintln(l.out, "  "+printable(e.Line)) // news only
	}
}
