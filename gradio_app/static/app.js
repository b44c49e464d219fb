// The visitor's side of a live session: one socket for words, sound and pictures (or WebRTC for the latter two); sound keeps the clock.
const RATE = 16000, STEP = 1280
let $, root, info, chosen = {sample: 'mira'}, made = null, pending = null
const S = {ws: null, ctx: null, gain: null, tap: null, mic: null, node: null, pc: null, way: '', base: null, extra: 0, held: [], pics: [], live: false, stalls: 0, late: 0, shown: [], lat: [], skew: [], skipped: 0, sources: new Set(), thumbs: [], bars: [], slack: [], next: 0, figures: {}, connected: 0, timers: []}
window.midas = {S, stats: () => ({live: S.live, way: S.way, stalls: S.stalls, late: S.late, shown: S.shown.length, times: S.shown, latency: S.lat, skew: S.skew, figures: S.figures, base: S.base, played: S.played || 0})}

const send = d => { if (S.ws && S.ws.readyState === 1) S.ws.send(JSON.stringify(d)) }
const say = t => { $('m-message').textContent = t || '' }
const state = (s, t) => { $('m-state').dataset.state = s; $('m-state').textContent = t || s }

async function ask(url, body, json = true) {
  const r = await fetch(url, body === undefined ? {} : {method: 'POST', body: json ? JSON.stringify(body) : body})
  let d = {}; try { d = await r.json() } catch { }
  if (!r.ok) throw Error(d.error || `The server answered ${r.status}.`)
  return d
}
const trying = f => async (...a) => { try { await f(...a) } catch (e) { say(e.message) } }

export async function begin(element) {
  root = element; $ = id => root.querySelector('#' + id)
  info = await ask('/api/start')
  people(); controls(); moods(); pad(); status(info.status)
  for (const [k, v] of Object.entries(info.languages)) $('m-lang').add(new Option(v, k))
  $('m-mic').onclick = trying(() => start(true)); $('m-quiet').onclick = trying(() => start(false)); $('m-stop').onclick = () => stop()
  $('m-random').onclick = trying(() => make({seed: Math.floor(Math.random()*2**31)})); $('m-draw').onclick = trying(() => make({identity: read()}))
  $('m-picture').onchange = trying(upload); $('m-audio').onchange = trying(file); $('m-say').onclick = trying(speak); $('m-hush').onclick = () => send({type: 'hush'})
  $('m-wish').onchange = () => send({type: 'steer', text: $('m-wish').value})
  $('m-level').oninput = () => { $('m-level-out').textContent = $('m-level').value; send({type: 'steer', level: +$('m-level').value}) }
  $('m-frames').onchange = () => send({type: 'steer', frames: +$('m-frames').value})
  $('m-volume').oninput = () => { if (S.gain) S.gain.gain.value = +$('m-volume').value; $('m-video').volume = +$('m-volume').value }
  show('/api/people/mira?big=1'); requestAnimationFrame(draw); setInterval(meter, 80)
  poll(); root.dataset.ready = '1'
}

function status(s) {
  const ok = s.state === 'ready', gone = s.state === 'missing'
  $('m-note').hidden = ok && s.note === 'Ready.'
  $('m-note').textContent = gone ? `The face cannot move: ${s.note} Choosing, making and bringing portraits still works, and so does hearing a sentence or a file.` : s.note
  $('m-mic').disabled = gone || S.busy || S.live; $('m-quiet').disabled = gone || S.busy || S.live
  const names = {6: '6 pictures (480 ms)', 3: '3 pictures (240 ms)', 2: '2 pictures (160 ms)', 1: '1 picture (80 ms)'}
  if ($('m-frames').options.length !== s.chunks.length) { $('m-frames').innerHTML = ''; for (const f of s.chunks) $('m-frames').add(new Option(names[f] || f, f)) }
  $('m-level').max = s.levels - 1; info.status = s
}
async function poll() { try { status(await ask('/api/status')) } catch { } setTimeout(poll, ['starting', 'loading', 'warming'].includes(info.status.state) ? 500 : 5000) }

// ---- who
function tile(name, url, value, box) {
  const l = document.createElement('label'), i = document.createElement('input'), p = document.createElement('img'), t = document.createElement('span')
  i.type = 'radio'; i.name = 'm-person'; i.setAttribute('aria-label', name); p.src = url; p.alt = ''; t.textContent = name; l.append(i, p, t); box.append(l)
  i.onchange = () => { chosen = value.ref; made = value.identity; fill(made); show(value.ref.sample ? url + '?big=1' : url); $('m-who').textContent = value.note || '' ; if (S.live) say('The new portrait takes over at the next start.') }
  return i
}
function people() { for (const p of info.people) { const i = tile(p.name, '/api/people/' + p.sample, {ref: {sample: p.sample}, identity: p.identity}, $('m-people')); if (p.sample === 'mira') { i.checked = true; made = p.identity } } }
function show(url) { $('m-still').src = url; if (!S.live) { $('m-still').hidden = false; $('m-canvas').hidden = $('m-video').hidden = true } }
function adopt(d) { const i = tile(d.name, d.picture, {ref: {key: d.key}, identity: d.identity, note: d.note}, $('m-people')); i.checked = true; i.onchange(); i.scrollIntoView({block: 'nearest'}) }
async function make(what) { $('m-who').textContent = 'Drawing…'; try { adopt(await ask('/api/person', what)) } catch (e) { $('m-who').textContent = e.message } }
async function upload() {
  const f = $('m-picture').files[0]; if (!f) return
  if (f.size > info.status.upload_mb*1e6) { $('m-who').textContent = `The picture is too large: ${info.status.upload_mb} MB at most.`; return }
  $('m-who').textContent = 'Looking at the picture…'
  try { adopt(await ask('/api/portrait?drawn=' + ($('m-drawn').checked ? 1 : 0), f, false)) } catch (e) { $('m-who').textContent = e.message }
  $('m-picture').value = ''
}
function controls() {
  for (const c of info.controls) {
    const l = document.createElement('label'); l.className = 'm-field'; l.textContent = c.label; let i
    if (c.kind === 'choice' || (c.kind === 'colour' && c.choices.length)) { i = document.createElement('select'); for (const v of c.choices) i.add(new Option(v.replaceAll('_', ' '), v)) }
    else { i = document.createElement('input'); i.type = c.kind === 'colour' ? 'color' : 'range'; if (c.kind === 'number') { i.min = c.low; i.max = c.high; i.step = c.step } }
    i.id = 'c-' + c.name; l.htmlFor = i.id; l.append(i); $('m-controls').append(l)
  }
  fill(made || Object.fromEntries(info.controls.map(c => [c.name, c.default])))
}
function fill(d) {
  if (!d) return
  for (const c of info.controls) { const i = $('c-' + c.name), v = d[c.name]; if (v === undefined) continue
    if (i.tagName === 'SELECT' && ![...i.options].some(o => o.value === v)) i.add(new Option('#' + v, v))
    i.value = i.type === 'color' ? '#' + v : v }
}
function read() {
  const d = {seed: made && made.seed || 1}
  for (const c of info.controls) { const i = $('c-' + c.name); d[c.name] = c.kind === 'number' ? +i.value : i.type === 'color' ? i.value.slice(1) : i.value }
  return d
}

// ---- steering
function moods() {
  for (const m of ['neutral', 'happy', 'sad', 'angry', 'surprised', 'thoughtful']) {
    const l = document.createElement('label'), i = document.createElement('input'), t = document.createElement('span')
    i.type = 'radio'; i.name = 'm-mood'; i.value = m; i.checked = m === 'neutral'; t.textContent = m; l.append(i, t); $('m-moods').append(l)
    i.onchange = () => { $('m-wish').value = ''; send({type: 'steer', expression: m, text: ''}) }
  }
}
const mood = () => root.querySelector('input[name=m-mood]:checked').value
function pad() {
  const p = $('m-pad'), k = $('m-knob'), keys = new Set(); let down = false, last = '0,0'
  const go = (x, y) => {
    k.style.left = 50 + 45*x + '%'; k.style.top = 50 + 45*y + '%'
    const yaw = +(1.2*x).toFixed(2), pitch = +(-.8*y).toFixed(2), now = yaw + ',' + pitch
    if (now !== last) { last = now; send({type: 'steer', yaw, pitch, roll: 0}) }
  }
  const at = e => { const r = p.getBoundingClientRect(), c = v => Math.max(-1, Math.min(1, v)); go(c((e.clientX - r.left)/r.width*2 - 1), c((e.clientY - r.top)/r.height*2 - 1)) }
  p.onpointerdown = e => { down = true; p.setPointerCapture(e.pointerId); at(e) }; p.onpointermove = e => { if (down) at(e) }; p.onpointerup = p.onpointercancel = () => { down = false; go(0, 0) }
  const arrow = () => go((keys.has('ArrowRight') - keys.has('ArrowLeft'))*.7, (keys.has('ArrowDown') - keys.has('ArrowUp'))*.7)
  p.onkeydown = e => { if (e.key.startsWith('Arrow')) { e.preventDefault(); keys.add(e.key); arrow() } }; p.onkeyup = e => { keys.delete(e.key); arrow() }; p.onblur = () => { keys.clear(); go(0, 0) }
}

// ---- voice
async function sound(key) { if (S.live) send({type: 'say', key}); else { pending = key; await start(false) } }
async function file() {
  const f = $('m-audio').files[0]; if (!f) return
  if (f.size > info.status.upload_mb*1e6) return say(`The file is too large: ${info.status.upload_mb} MB at most.`)
  wake(); say('Reading the file…'); const d = await ask('/api/audio', f, false); say(`${d.seconds} s of sound.`); $('m-audio').value = ''
  if (info.status.state === 'missing') return
  await sound(d.key)
}
async function speak() { wake(); say('Speaking…'); const d = await ask('/api/speech', {text: $('m-text').value, lang: $('m-lang').value}); say(''); if (info.status.state === 'missing') return say(`${d.seconds} s of speech were made; the face cannot say them without the model.`); await sound(d.key) }

// ---- a session
function wake() {
  if (!S.ctx) { S.ctx = new AudioContext(); S.gain = S.ctx.createGain(); S.tap = S.ctx.createAnalyser(); S.tap.fftSize = 2048; S.gain.connect(S.ctx.destination); S.gain.gain.value = +$('m-volume').value }
  if (S.ctx.state !== 'running') S.ctx.resume()
}
async function start(withMic) {
  if (S.live || S.busy) return
  S.busy = true; S.gone = false; wake(); say(''); $('m-result').hidden = true; state('connecting', 'connecting…'); $('m-mic').disabled = $('m-quiet').disabled = true; $('m-stop').disabled = false
  Object.assign(S, {base: null, extra: 0, held: [], pics: [], stalls: 0, late: 0, shown: [], lat: [], skew: [], thumbs: [], bars: [], slack: [], next: 0, tardy: 0, way: '', played: 0, figures: {}})
  try {
    if (withMic) {
      if (!navigator.mediaDevices) throw Error('The browser gives no microphone to pages that are not served by https or from this machine.')
      try { S.mic = await navigator.mediaDevices.getUserMedia({audio: {echoCancellation: true, noiseSuppression: false, autoGainControl: false}}) }
      catch (e) { throw Error(e.name === 'NotAllowedError' ? 'The microphone was not allowed. Allow it in the address bar, or start without.' : `There is no microphone (${e.name}).`) }
    }
    const ws = S.ws = new WebSocket((location.protocol === 'https:' ? 'wss://' : 'ws://') + location.host + '/api/live')
    ws.binaryType = 'arraybuffer'
    ws.onopen = () => send({type: 'start', portrait: chosen, frames: +$('m-frames').value || 6, mic: withMic, steer: {expression: mood(), text: $('m-wish').value, level: +$('m-level').value}})
    ws.onmessage = e => { if (ws === S.ws) typeof e.data === 'string' ? told(JSON.parse(e.data)) : got(e.data) }
    ws.onclose = () => { if (ws === S.ws) over(S.gone ? null : 'The connection was lost.') }
  } catch (e) { over(e.message, 'off') }
}
function stop() { S.gone = true; if (S.ws && S.ws.readyState === 1) { send({type: 'stop'}); $('m-stop').disabled = true } else over('') }
function over(message, how) {
  const was = S.live; S.live = S.busy = false
  if (S.mic) S.mic.getTracks().forEach(t => t.stop()); if (S.node) { S.node.disconnect(); S.node = null }; S.mic = null
  if (S.pc) { S.pc.close(); S.pc = null }
  for (const s of S.sources) try { s.stop() } catch { }
  S.sources.clear(); S.timers.forEach(clearTimeout); S.timers = []
  for (const p of S.pics) p.bmp.close(); S.pics = []; S.held = []
  const ws = S.ws; S.ws = null; if (ws) ws.close()
  state(how || (message && was ? 'lost' : 'off'), message && was ? 'lost' : 'not started'); if (message) say(message)
  $('m-stop').disabled = true; const gone = info.status.state === 'missing'; $('m-mic').disabled = $('m-quiet').disabled = gone; pending = null
}
function told(d) {
  if (d.type === 'queue') { state('waiting', d.before ? `number ${d.before} in the queue` : 'warming up'); say(d.message) }
  else if (d.type === 'live') { S.live = true; S.fps = d.fps; S.connected = performance.now(); say(''); $('m-canvas').width = d.width; $('m-canvas').height = d.height; state('live', 'live'); open(); if (pending) { send({type: 'say', key: pending}); pending = null } }
  else if (d.type === 'figures') figures(d)
  else if (d.type === 'refused') { say(d.message); if (d.fatal) over(d.message, 'off') }
  else if (d.type === 'answer') S.pc && S.pc.setRemoteDescription({type: 'answer', sdp: d.sdp}).catch(e => say(e.message))
  else if (d.type === 'ended') {
    S.gone = true; over(d.message, 'off'); state('off', 'stopped'); show($('m-still').src)
    if (d.recording) { const url = '/api/recording/' + d.recording; $('m-replay').src = url; $('m-download').href = url; $('m-result').hidden = false }
  }
}
async function open() {
  const want = $('m-way').value
  if (want !== 'ws' && info.status.webrtc && window.RTCPeerConnection) { try { await rtc(); return } catch (e) { console.info('WebRTC:', e.message) } if (!S.live) return; if (S.pc) { S.pc.close(); S.pc = null } }
  await plain()
}
async function plain() {
  S.way = 'ws'; $('m-canvas').hidden = false; $('m-video').hidden = $('m-still').hidden = true
  if (!S.mic) return
  send({type: 'mic', on: true, rate: Math.round(S.ctx.sampleRate)})
  await S.ctx.audioWorklet.addModule('/api/file/mic.js')
  if (!S.mic) return
  S.node = new AudioWorkletNode(S.ctx, 'mic', {numberOfOutputs: 0}); S.ctx.createMediaStreamSource(S.mic).connect(S.node)
  S.node.port.onmessage = e => { if (S.ws && S.ws.readyState === 1 && S.ws.bufferedAmount < 200000) S.ws.send(e.data) }
}
async function rtc() {
  const pc = S.pc = new RTCPeerConnection({iceServers: []}), v = $('m-video'), stream = new MediaStream()
  if (S.mic) pc.addTransceiver(S.mic.getAudioTracks()[0], {direction: 'sendrecv'}); else pc.addTransceiver('audio', {direction: 'recvonly'})
  pc.addTransceiver('video', {direction: 'recvonly'})
  pc.ontrack = e => { stream.addTrack(e.track); v.srcObject = stream; v.volume = +$('m-volume').value; v.play().catch(() => { }) }
  await pc.setLocalDescription(await pc.createOffer())
  await new Promise(r => { if (pc.iceGatheringState === 'complete') r(); else { pc.onicegatheringstatechange = () => pc.iceGatheringState === 'complete' && r(); setTimeout(r, 1500) } })
  send({type: 'offer', sdp: pc.localDescription.sdp})
  await new Promise((ok, no) => { pc.onconnectionstatechange = () => { if (pc.connectionState === 'connected') ok(); if (['failed', 'closed'].includes(pc.connectionState)) no(Error(pc.connectionState)) }; setTimeout(() => no(Error('no connection in 5 s')), 5000) })
    .catch(e => { send({type: 'leave'}); throw e })
  S.way = 'webrtc'; v.hidden = false; $('m-canvas').hidden = $('m-still').hidden = true
  pc.onconnectionstatechange = () => { if (['failed', 'disconnected'].includes(pc.connectionState) && S.live) state('lost', 'connection weak'); if (pc.connectionState === 'connected') state('live', 'live') }
  S.ctx.createMediaStreamSource(stream).connect(S.tap)
  const frame = (now, m) => { if (S.pc !== pc) return; S.shown.push(performance.now()); if (S.shown.length > 2000) S.shown.shift(); v.requestVideoFrameCallback(frame) }
  if (v.requestVideoFrameCallback) v.requestVideoFrameCallback(frame)
}

// ---- sound and pictures through the socket
function got(buffer) {
  const v = new DataView(buffer), kind = v.getUint8(0), pts = v.getUint32(4, true), wait = v.getFloat32(8, true)
  if (kind === 1) { S.held.push({pts, x: new Int16Array(buffer, 12)}); if (S.base !== null) play(); else S.timers.push(setTimeout(() => { if (S.base === null && S.held.length) { clock(S.held[0].pts) } }, 1500)) }
  else {
    const arrived = performance.now()
    if (S.base === null) clock(pts)
    S.slack.push(S.base + pts/RATE - S.ctx.currentTime); if (S.slack.length > 25) S.slack.shift()
    if (S.slack.length === 25 && S.mic && !S.figures.playing && Math.min(...S.slack) > .14) { S.base -= .05; S.slack = [] }      // win back what a stall has cost
    createImageBitmap(new Blob([new Uint8Array(buffer, 12)], {type: 'image/jpeg'})).then(bmp => {
      const frozen = arrived - (S.shown[S.shown.length - 1] || 0) > 700                                       // a late picture is better than none for long
      if (!S.live || time() > pts + STEP && !frozen) { S.late++; bmp.close(); S.tardy = (S.tardy || 0) + 1; if (S.tardy > 8 && S.extra < .3) { S.extra += .05; S.base += .05; S.tardy = 0 } return }
      S.tardy = Math.max(0, (S.tardy || 0) - .5); S.pics.push({pts, bmp, wait, arrived}); while (S.pics.length > 80) S.pics.shift().bmp.close()
    }).catch(() => { S.late++ })
  }
}
function clock(pts) { S.base = S.ctx.currentTime + .05 - pts/RATE; play() }
const time = () => S.base === null ? -1 : (S.ctx.currentTime - (S.ctx.outputLatency || 0) - S.base)*RATE
function play() {
  for (const {pts, x} of S.held) {
    const b = S.ctx.createBuffer(1, x.length, RATE), y = b.getChannelData(0); for (let i = 0; i < x.length; i++) y[i] = x[i]/32768
    let at = S.base + pts/RATE
    if (at < S.ctx.currentTime) { S.stalls++; S.base += S.ctx.currentTime - at + .03; at = S.base + pts/RATE }
    const s = S.ctx.createBufferSource(), over = Math.max(0, S.next - at)                     // after catching up the clock, a little sound is left out
    s.buffer = b; s.connect(S.gain); s.connect(S.tap); if (over < b.duration) s.start(at + over, over)
    S.next = at + b.duration; S.sources.add(s); s.onended = () => S.sources.delete(s); S.played = pts + x.length
  }
  S.held = []
}
function draw() {
  requestAnimationFrame(draw)
  if (!S.live || S.way !== 'ws' || S.base === null) return
  const t = time(); let p = null
  while (S.pics.length && S.pics[0].pts <= t) { if (p) { p.bmp.close(); S.late++ } p = S.pics.shift() }
  if (!p) return
  $('m-canvas').getContext('2d').drawImage(p.bmp, 0, 0, $('m-canvas').width, $('m-canvas').height); p.bmp.close()
  const now = performance.now(); S.shown.push(now); S.lat.push(Math.round(p.wait*1000 + now - p.arrived)); S.skew.push(Math.round((t - p.pts)/16))
  for (const a of [S.shown, S.lat, S.skew]) if (a.length > 2000) a.shift()
}

// ---- the live panel
const middle = a => [...a].sort((x, y) => x - y)[a.length >> 1]
function figures(d) {
  S.figures = d
  const fps = S.shown.filter(t => t > performance.now() - 3000).length/3, own = S.lat.slice(-60)
  $('f-latency').textContent = own.length ? middle(own) + ' ms' : d.latency_ms ? d.latency_ms + ' ms + network' : '–'
  $('f-fps').textContent = fps.toFixed(1) + ' shown, ' + d.fps + ' drawn'
  $('f-lost').textContent = `${d.skipped} + ${S.late + (d.dropped || 0)}`; $('f-left').textContent = Math.floor(d.left/60) + ':' + String(d.left % 60).padStart(2, '0')
  $('f-stages').textContent = Object.entries(d.stages_ms).map(([k, v]) => `${k} ${v} ms`).join(' · ') + (S.way ? ` · ${S.way === 'ws' ? 'WebSocket' : 'WebRTC'}` : '')
  if ($('m-state').dataset.state !== 'lost') state(d.talking ? 'live' : 'listening', d.talking ? 'live' : 'live, listening')
}
let beat = 0
function meter() {
  if (!S.live || !S.tap) return
  const x = new Float32Array(1280); S.tap.getFloatTimeDomainData(x); let m = 0; for (const v of x) m = Math.max(m, Math.abs(v))
  S.bars.push(m); if (S.bars.length > 90) S.bars.shift()
  const screen = S.way === 'webrtc' ? $('m-video') : $('m-canvas')
  if (beat++ % 8 === 0 && S.shown.length) { const c = document.createElement('canvas'); c.width = c.height = 56; try { c.getContext('2d').drawImage(screen, 0, 0, 56, 56); S.thumbs.push({c, beat}) } catch { } if (S.thumbs.length > 13) S.thumbs.shift() }
  const g = $('m-strip').getContext('2d'), w = 720; g.clearRect(0, 0, w, 96)
  for (const t of S.thumbs) g.drawImage(t.c, w - 64 - (beat - t.beat)*8, 2)
  g.fillStyle = '#2a8f89'; S.bars.forEach((b, i) => { const h = Math.max(1, b*32); g.fillRect(w - (S.bars.length - i)*8, 79 - h/2, 6, h) })
}
