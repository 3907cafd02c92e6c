package dockerfile

import (
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"

	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// Step is one instruction, worked out. At most one of Run, Copy and MakeDir is
// set; the others change nothing but the configuration.
type Step struct {
	Text    string // as written, on one line
	Line    int
	Run     *Run
	Copy    *Copy
	MakeDir string
	Note    string     // for people
	Config  oci.Config // that holds after it
}

// Run is a command in the root file system of its stage.
type Run struct {
	Command []string
	Shell   bool `json:"-"` // the command is a line behind a shell's words
	Env     map[string]string
	User    string // as an image says it; empty means root
	Workdir string
}

// Copy puts files there.
type Copy struct {
	Stage    int      // whose files; -1: those of the context
	Sources  []string // patterns, relative
	Contents []Content
	Dest     string // absolute; a slash at its end says that it is a directory
	Chown    string // "user:group", or empty
	Chmod    string // octal, or empty
	Exclude  []string
	Unpack   bool // ADD: files that are tar files are unpacked
}

// Content is a file whose content stands in the Dockerfile.
type Content struct{ Name, Data string }

// planner works through one stage.
type planner struct {
	f      *File
	index  int
	config oci.Config
	args   map[string]string
	cmdSet bool // in this stage
}

// Plan works out the steps of a stage, on the configuration of its base. It is to
// be called once for each stage: words are expanded in place.
func (f *File) Plan(stage int, base oci.Config) ([]Step, error) {
	p := planner{f: f, index: stage, config: base, args: map[string]string{}}
	p.config.Env = merged(nil, base.Env)
	var steps []Step
	for _, c := range f.Stages[stage].commands {
		s := Step{Text: oneLine(c), Line: line(c)}
		if err := p.step(c, &s); err != nil {
			return nil, err
		}
		s.Config = p.config
		s.Config.Env = maps.Clone(p.config.Env)
		steps = append(steps, s)
	}
	return steps, nil
}

// oneLine is an instruction as people know it again.
func oneLine(c instructions.Command) string {
	const most = 200
	text := c.Name()
	if s, ok := c.(interface{ String() string }); ok {
		text = s.String()
	}
	text = strings.Join(strings.Fields(strings.ReplaceAll(text, "\\\n", " ")), " ")
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

func (p *planner) step(c instructions.Command, s *Step) error {
	if e, ok := c.(instructions.SupportsSingleWordExpansion); ok {
		if _, isArg := c.(*instructions.ArgCommand); !isArg { // declares each in turn
			if err := e.Expand(p.f.expander(merged(p.args, p.config.Env))); err != nil {
				return invalid(s.Line, "%v", err)
			}
		}
	}
	switch c := c.(type) {
	case *instructions.RunCommand:
		return p.run(c, s)
	case *instructions.CopyCommand:
		return p.copy(c, s)
	case *instructions.AddCommand:
		return p.add(c, s)
	case *instructions.WorkdirCommand:
		p.config.WorkingDir = p.abs(c.Path)
		s.MakeDir = p.config.WorkingDir
	case *instructions.ArgCommand:
		return p.f.declare(c.Args, p.args, p.config.Env, s.Line)
	case *instructions.OnbuildCommand:
		return invalid(s.Line, "ONBUILD is not known here: templates are not built upon")
	default:
		return p.configure(c, s)
	}
	return nil
}

// configure changes the configuration and nothing else.
func (p *planner) configure(c instructions.Command, s *Step) error {
	switch c := c.(type) {
	case *instructions.EnvCommand:
		for _, kv := range c.Env {
			p.config.Env[kv.Key] = kv.Value
		}
	case *instructions.LabelCommand:
		p.config.Labels = merged(p.config.Labels, nil)
		for _, kv := range c.Labels {
			p.config.Labels[kv.Key] = kv.Value
		}
	case *instructions.UserCommand:
		p.config.User = c.User
	case *instructions.EntrypointCommand:
		p.config.Entrypoint = p.command(c.ShellDependantCmdLine)
		if !p.cmdSet { // the base's command was meant for another one
			p.config.Cmd = nil
		}
	case *instructions.CmdCommand:
		p.config.Cmd, p.cmdSet = p.command(c.ShellDependantCmdLine), true
	case *instructions.HealthCheckCommand:
		h := c.Health
		p.config.Healthcheck = &oci.Healthcheck{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, Retries: h.Retries}
	case *instructions.ExposeCommand:
		return p.expose(c, s)
	case *instructions.StopSignalCommand:
		p.config.StopSignal = c.Signal
	case *instructions.ShellCommand:
		p.config.Shell = c.Shell
	case *instructions.VolumeCommand:
		s.Note = "a sandbox has no volumes: what is written there is on its disk"
	case *instructions.MaintainerCommand:
	default:
		return invalid(s.Line, "%s is not known here", c.Name())
	}
	return nil
}

func (p *planner) expose(c *instructions.ExposeCommand, s *Step) error {
	ports := slices.Clone(p.config.ExposedPorts)
	for _, word := range c.Ports {
		expanded, err := p.f.lex.ProcessWords(word, values(merged(p.args, p.config.Env)))
		if err != nil {
			return invalid(s.Line, "%v", err)
		}
		for _, port := range expanded {
			if !strings.Contains(port, "/") {
				port += "/tcp"
			}
			ports = append(ports, port)
		}
	}
	slices.Sort(ports)
	p.config.ExposedPorts = slices.Compact(ports)
	return nil
}

// command puts the shell before a line.
func (p *planner) command(c instructions.ShellDependantCmdLine) []string {
	if !c.PrependShell {
		return slices.Clone(c.CmdLine)
	}
	sh := p.config.Shell
	if len(sh) == 0 {
		sh = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(sh), strings.Join(c.CmdLine, " "))
}

func (p *planner) run(c *instructions.RunCommand, s *Step) error {
	if len(c.FlagsUsed) > 0 {
		return invalid(s.Line, "RUN --%s is not known here: a step has the whole machine, and nothing is mounted into it", strings.Join(c.FlagsUsed, ", --"))
	}
	line := c.ShellDependantCmdLine
	if len(c.Files) > 0 {
		script, err := heredoc(c, s.Line)
		if err != nil {
			return err
		}
		line.CmdLine = []string{script}
	}
	s.Run = &Run{
		Command: p.command(line), Shell: line.PrependShell, Env: merged(p.args, p.config.Env), User: p.config.User,
		Workdir: p.abs(""),
	}
	if len(s.Run.Command) == 0 || s.Run.Command[0] == "" {
		return invalid(s.Line, "RUN has no command")
	}
	return nil
}

// heredoc makes the script of a RUN with documents behind it.
func heredoc(c *instructions.RunCommand, at int) (string, error) {
	if len(c.CmdLine) != 1 || !c.PrependShell {
		return "", invalid(at, "RUN with a document needs a line for the shell")
	}
	if parser.MustParseHeredoc(c.CmdLine[0]) == nil { // the shell reads them itself
		full := c.CmdLine[0]
		for _, f := range c.Files {
			full += "\n" + f.Data + f.Name
		}
		return full, nil
	}
	data := c.Files[0].Data
	if c.Files[0].Chomp {
		data = parser.ChompHeredocContent(data)
	}
	if strings.HasPrefix(data, "#!") {
		return "", invalid(at, "RUN with a document for another interpreter is not known here: COPY it to a file and run that")
	}
	return data, nil
}

func (p *planner) copy(c *instructions.CopyCommand, s *Step) error {
	if c.Parents {
		return invalid(s.Line, "COPY --parents is not known here")
	}
	out := &Copy{Stage: -1, Chown: c.Chown, Chmod: c.Chmod, Exclude: c.ExcludePatterns}
	if c.From != "" {
		out.Stage = p.f.find(c.From, true)
		if out.Stage < 0 || out.Stage >= p.index {
			return invalid(s.Line, "COPY --from=%.100s: there is no earlier stage of that name; give the image a stage of its own: FROM %.100s AS x", c.From, c.From)
		}
	}
	s.Copy = out
	return p.sources(c.SourcesAndDest, s)
}

func (p *planner) add(c *instructions.AddCommand, s *Step) error {
	if c.Checksum != "" || c.KeepGitDir != nil {
		return invalid(s.Line, "ADD takes files of the context only: its flags for the network are not known here")
	}
	for _, source := range c.SourcePaths {
		if strings.Contains(source, "://") || strings.HasPrefix(source, "git@") {
			return invalid(s.Line, "ADD %.100s: nothing is fetched from the network; use RUN with the program that you want to fetch it with", source)
		}
	}
	s.Copy = &Copy{Stage: -1, Chown: c.Chown, Chmod: c.Chmod, Exclude: c.ExcludePatterns, Unpack: c.Unpack == nil || *c.Unpack}
	return p.sources(c.SourcesAndDest, s)
}

func (p *planner) sources(c instructions.SourcesAndDest, s *Step) error {
	if err := c.ExpandRaw(p.f.expander(merged(p.args, p.config.Env))); err != nil {
		return invalid(s.Line, "%v", err)
	}
	for _, content := range c.SourceContents {
		s.Copy.Contents = append(s.Copy.Contents, Content{Name: content.Path, Data: content.Data})
	}
	for _, source := range c.SourcePaths {
		if source == "" {
			return invalid(s.Line, "a source is empty")
		}
		s.Copy.Sources = append(s.Copy.Sources, source)
	}
	if c.DestPath == "" {
		return invalid(s.Line, "the destination is empty")
	}
	s.Copy.Dest = p.abs(c.DestPath)
	if strings.HasSuffix(c.DestPath, "/") || c.DestPath == "." || strings.HasSuffix(c.DestPath, "/.") ||
		len(s.Copy.Sources)+len(s.Copy.Contents) > 1 {
		s.Copy.Dest = strings.TrimSuffix(s.Copy.Dest, "/") + "/"
	}
	return nil
}

// abs makes a path absolute, from the working directory.
func (p *planner) abs(name string) string {
	base := p.config.WorkingDir
	if !strings.HasPrefix(base, "/") {
		base = "/" + base
	}
	if strings.HasPrefix(name, "/") {
		return path.Clean(name)
	}
	return path.Join(base, name)
}
