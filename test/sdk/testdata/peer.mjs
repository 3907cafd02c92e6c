// Runs the JavaScript SDK of the current folder against an agent on port 49983.
// Usage: node peer.mjs DIRECTORY. Prints one line of JSON for each check. PATIENCE
// is by how much longer one may take than on an ordinary machine.
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const require = createRequire(process.cwd() + '/')
const sdk = await import(pathToFileURL(require.resolve('e2b')).href)
const { Sandbox } = sdk.default ?? sdk
const dir = process.argv[2]
const box = await Sandbox.create({ debug: true })
await box.files.makeDir(dir)

const encode = (s) => new TextEncoder().encode(s)
const patience = Number(process.env.PATIENCE ?? 1)
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

function equal(got, want, what = '') {
  const [a, b] = [JSON.stringify(got), JSON.stringify(want)]
  if (a !== b) throw new Error(`${what} got ${a?.slice(0, 300)}, want ${b?.slice(0, 300)}`)
}

async function until(what, condition, found = () => '') {
  for (let i = 0; i < 1200 * patience; i++) {
    if (await condition()) return
    await sleep(25)
  }
  throw new Error(`not ${what} ${found()}`)
}

async function fails(call, name) {
  try {
    await call()
  } catch (error) {
    const names = []
    for (let e = error.constructor; e && e.name; e = Object.getPrototypeOf(e)) names.push(e.name)
    if (!names.includes(name)) throw new Error(`failed with ${names[0]}: ${error.message}, want ${name}`)
    return error
  }
  throw new Error('did not fail')
}

const checks = {
  'the sandbox runs': async () => equal(await box.isRunning(), true),

  'commands: output, errors and exit code': async () => {
    const done = await box.commands.run('echo out; echo err >&2')
    equal([done.stdout, done.stderr, done.exitCode], ['out\n', 'err\n', 0])
    const failed = await fails(() => box.commands.run('echo half; exit 3'), 'CommandExitError')
    equal([failed.exitCode, failed.stdout, failed.error], [3, 'half\n', 'exit status 3'])
  },
  'commands: environment and directory': async () => {
    const done = await box.commands.run('echo $X; pwd', { envs: { X: 'x y' }, cwd: dir })
    equal(done.stdout, `x y\n${dir}\n`)
    await fails(() => box.commands.run('true', { cwd: '/no/such/place' }), 'InvalidArgumentError')
    await fails(() => box.commands.run('true', { user: 'nobody-knows' }), 'AuthenticationError')
  },
  'commands: in the background, listed, connected, killed': async () => {
    const command = await box.commands.run('while read line; do echo "got $line"; done; exit 5', { background: true, stdin: true })
    const listed = (await box.commands.list()).find((p) => p.pid === command.pid)
    equal([listed?.cmd, listed?.args.slice(0, 2)], ['/bin/bash', ['-l', '-c']])
    let seen = ''
    const second = await box.commands.connect(command.pid, { onStdout: (data) => (seen += data) })
    await box.commands.sendStdin(command.pid, 'one\ntwo\n')
    await until('echoed', () => seen === 'got one\ngot two\n')
    if (command.closeStdin) await command.closeStdin()
    else await box.commands.kill(command.pid)
    const end = await fails(() => command.wait(), 'CommandExitError')
    equal(end.exitCode, command.closeStdin ? 5 : -1)
    await fails(() => second.wait(), 'CommandExitError')
    equal(await box.commands.kill(command.pid), false, 'kill of what has ended')

    const endless = await box.commands.run('sleep 300', { background: true })
    equal(await endless.kill(), true)
    equal((await fails(() => endless.wait(), 'CommandExitError')).exitCode, -1)
  },
  'commands: a timeout, and none': async () => {
    await fails(() => box.commands.run('sleep 30', { timeoutMs: 500 }), 'TimeoutError')
    equal((await box.commands.run('sleep 1; echo done', { timeoutMs: 0 })).stdout, 'done\n')
  },
  'commands: much output': async () => {
    const done = await box.commands.run('seq 1 300000')
    const lines = done.stdout.split('\n')
    equal([lines.length, lines[0], lines[299999]], [300001, '1', '300000'])
    equal((await box.commands.run(`printf 'gr\\303\\274\\303\\237e \\360\\237\\220\\255'`)).stdout, 'grüße 🐭')
  },
  'commands: many at once': async () => {
    const done = await Promise.all(Array.from({ length: 30 }, (_, i) => box.commands.run(`echo ${i}`)))
    equal(done.map((d) => d.stdout.trim()), Array.from({ length: 30 }, (_, i) => `${i}`))
  },

  'pty: type, resize, reconnect, leave': async () => {
    let screen = ''
    const onData = (data) => (screen += new TextDecoder().decode(data))
    const terminal = await box.pty.create({ cols: 80, rows: 24, onData, envs: { PS1: '$ ' }, cwd: dir })
    await box.pty.sendInput(terminal.pid, encode('stty size; pwd\n'))
    await until('of that size', () => screen.includes('24 80') && screen.includes(dir))
    await box.pty.resize(terminal.pid, { cols: 132, rows: 50 })
    await box.pty.sendInput(terminal.pid, encode('stty size\n'))
    await until('resized', () => screen.includes('50 132'))
    await terminal.disconnect()
    if (box.pty.connect) {
      let again = ''
      await box.pty.connect(terminal.pid, { onData: (data) => (again += new TextDecoder().decode(data)) })
      await box.pty.sendInput(terminal.pid, encode('echo $((40+2))\n'))
      await until('connected again', () => again.includes('42'))
    }
    equal(await box.pty.kill(terminal.pid), true)
    await until('gone', async () => !(await box.commands.list()).some((p) => p.pid === terminal.pid))
    equal(await box.pty.kill(terminal.pid), false)
  },
  'pty: its exit code': async () => {
    const terminal = await box.pty.create({ cols: 80, rows: 24, onData: () => {} })
    await box.pty.sendInput(terminal.pid, encode('exit 7\n'))
    equal((await fails(() => terminal.wait(), 'CommandExitError')).exitCode, 7)
  },

  'files: write and read in all forms': async () => {
    const path = `${dir}/deep/er/a b ü (1).txt`
    const info = await box.files.write(path, 'hello')
    equal([info.name, info.path, info.type], ['a b ü (1).txt', path, 'file'])
    equal(await box.files.read(path), 'hello')
    equal([...(await box.files.read(path, { format: 'bytes' }))], [...encode('hello')])
    equal(await (await box.files.read(path, { format: 'blob' })).text(), 'hello')
    let streamed = ''
    for await (const chunk of await box.files.read(path, { format: 'stream' })) streamed += new TextDecoder().decode(chunk)
    equal(streamed, 'hello')
    await box.files.write(path, new Blob(['again']))
    equal(await box.files.read(path), 'again')
    await box.files.write(`${dir}/empty`, '')
    equal(await box.files.read(`${dir}/empty`), '')
  },
  'files: compressed, and as octets': async () => {
    const text = 'compress me '.repeat(20000)
    await box.files.write(`${dir}/packed`, text, { gzip: true })
    equal((await box.files.read(`${dir}/packed`, { gzip: true })) === text, true)
    await box.files.write(`${dir}/octets`, text, { useOctetStream: true })
    equal((await box.files.read(`${dir}/octets`)) === text, true)
  },
  'files: several at once, and a large one': async () => {
    const large = new Uint8Array(8 << 20).map((_, i) => (i * 31) & 255)
    const written = await box.files.write([
      { path: `${dir}/one`, data: '1' },
      { path: `${dir}/sub/two`, data: '22' },
      { path: `${dir}/large`, data: large.buffer },
    ])
    equal(written.map((w) => w.path), [`${dir}/one`, `${dir}/sub/two`, `${dir}/large`])
    equal(Buffer.compare(Buffer.from(await box.files.read(`${dir}/large`, { format: 'bytes' })), Buffer.from(large)), 0)
  },
  'files: metadata': async () => {
    const metadata = { author: 'me', 'content-kind': 'note' }
    equal((await box.files.write(`${dir}/m`, 'x', { metadata })).metadata, metadata)
    const sorted = (m) => Object.fromEntries(Object.entries(m ?? {}).sort())
    equal(sorted((await box.files.getInfo(`${dir}/m`)).metadata), metadata)
    await box.files.write(`${dir}/m`, 'y', { metadata: { other: 'z' } })
    equal(sorted((await box.files.getInfo(`${dir}/m`)).metadata), { other: 'z' })
  },
  'files: directories and information': async () => {
    equal(await box.files.makeDir(`${dir}/made/deep`), true)
    equal(await box.files.makeDir(`${dir}/made/deep`), false)
    await box.files.write(`${dir}/made/f`, 'four')
    await box.commands.run(`ln -s f ${dir}/made/link && chmod 640 ${dir}/made/f`)
    const info = await box.files.getInfo(`${dir}/made/f`)
    equal([info.size, info.mode, info.permissions, info.type], [4, 0o640, '-rw-r-----', 'file'])
    equal((await box.files.getInfo(`${dir}/made/link`)).symlinkTarget, `${dir}/made/f`)
    equal((await box.files.list(`${dir}/made`)).map((e) => `${e.type} ${e.name}`), ['dir deep', 'file f', 'file link'])
    equal((await box.files.list(dir, { depth: 2 })).some((e) => e.path === `${dir}/made/f`), true)
    equal((await box.files.rename(`${dir}/made/f`, `${dir}/made/new/g`)).path, `${dir}/made/new/g`)
    equal([await box.files.exists(`${dir}/made/f`), await box.files.exists(`${dir}/made/new/g`)], [false, true])
    await box.files.remove(`${dir}/made`)
    equal(await box.files.exists(`${dir}/made`), false)
  },
  'files: what fails': async () => {
    await fails(() => box.files.read(`${dir}/missing`), 'NotFoundError')
    await fails(() => box.files.read(dir), 'InvalidArgumentError')
    await fails(() => box.files.list(`${dir}/missing`), 'NotFoundError')
    await fails(() => box.files.rename(`${dir}/missing`, `${dir}/x`), 'NotFoundError')
    await fails(() => box.files.read(`${dir}/one`, { user: 'nobody-knows' }), 'AuthenticationError')
    await fails(() => box.files.watchDir(`${dir}/missing`, () => {}), 'NotFoundError')
    await box.files.remove(`${dir}/missing`)
  },

  'watch: what happens in a directory': async () => {
    await box.files.makeDir(`${dir}/watched/sub`)
    const events = []
    const handle = await box.files.watchDir(`${dir}/watched`, (e) => events.push(e), { recursive: true, includeEntry: true })
    await box.files.write(`${dir}/watched/new`, 'x')
    await box.files.write(`${dir}/watched/new`, 'xy')
    await box.commands.run(`cd ${dir}/watched && mkdir fast && echo x > fast/file && chmod 600 new && mv new sub/moved && rm sub/moved`)
    const want = ['create new', 'write new', 'write new', 'create fast', 'create fast/file', 'write fast/file', 'chmod new', 'rename new', 'create sub/moved', 'remove sub/moved']
    await until('told of all', () => want.every((w) => events.some((e) => `${e.type} ${e.name}` === w)), () => events.map((e) => `${e.type} ${e.name}`))
    equal(events.map((e) => `${e.type} ${e.name}`).sort(), [...want].sort())
    const entry = events.find((e) => e.type === 'write' && e.name === 'fast/file')?.entry
    equal([entry?.path, entry?.size], [`${dir}/watched/fast/file`, 2])
    await handle.stop()
  },
  'watch: a thousand files': async () => {
    await box.files.makeDir(`${dir}/many`)
    const seen = new Map()
    const handle = await box.files.watchDir(`${dir}/many`, (e) => seen.set(`${e.type} ${e.name}`, (seen.get(`${e.type} ${e.name}`) ?? 0) + 1))
    await box.commands.run(`cd ${dir}/many && for i in $(seq 1 1000); do echo x > $i; done`)
    await until('told of all', () => seen.size >= 2000, () => `but of ${seen.size}`)
    equal([seen.size, [...seen.values()].every((n) => n === 1)], [2000, true])
    await handle.stop()
  },
}

for (const [name, check] of Object.entries(checks)) {
  const began = Date.now()
  let error
  try {
    const late = new Promise((_, reject) => setTimeout(() => reject(new Error(`took longer than ${60 * patience} s`)), 60_000 * patience).unref())
    await Promise.race([check(), late])
  } catch (e) {
    error = `${e.name}: ${e.message}`
  }
  console.log(JSON.stringify({ name, error, ms: Date.now() - began }))
}
process.exit(0)
