// 20 ms pieces of the microphone as 16-bit samples
class Mic extends AudioWorkletProcessor {
  constructor() { super(); this.n = Math.round(sampleRate/50); this.buf = new Int16Array(this.n); this.at = 0; }
  process(inputs) {
    const x = inputs[0][0]; if (!x) return true;
    for (let i = 0; i < x.length; i++) {
      this.buf[this.at++] = Math.max(-1, Math.min(1, x[i]))*32767;
      if (this.at === this.n) { this.port.postMessage(this.buf.buffer, [this.buf.buffer]); this.buf = new Int16Array(this.n); this.at = 0; }
    }
    return true;
  }
}
registerProcessor('mic', Mic);
